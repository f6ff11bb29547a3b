package guard

import (
	"slices"
	"sync"

	"kalium.dev/kalium/runtime/internal/policy"
)

// branchesMax bounds the ways in which the messages so far may belong to the invocations. A message that would make more
// of them is refused.
const branchesMax = 64

// walk is where the invocations of a sandbox stand in their CFGs. Which of several a message belongs to is not seen, so
// all ways that the policy allows are kept: each branch holds one cursor for each part. With one invocation at a time
// there is one branch, and its cursors are the parts' own.
//
// Whatever order the program's messages have, one released request buys at most one path: a message is allowed when at
// least one branch explains all messages so far.
type walk struct {
	mu       sync.Mutex // held while the controller is asked: messages have an order
	parts    []*invocation
	branches [][]policy.Cursor // nil when there is one
	startup  *invocation       // of parts, until the first request
	started  bool              // a startup would come too late

	texts  map[string]string // what recent messages look like in the log
	states []int             // of the verdict that is being logged
}

// step is a message that may be sent, and where the walk stands after it.
type step struct {
	verdict  policy.Verdict
	by       *invocation // whose message it is; one that stands for several when that is not known
	next     policy.Cursor
	branches [][]policy.Cursor // in the place of next, when there was or is more than one
	again    *lostMessage      // it is sent again, and nothing moves
}

func (w *walk) add(inv *invocation) {
	for i := range w.branches {
		w.branches[i] = append(w.branches[i], inv.cursor)
	}
	w.parts = append(w.parts, inv)
}

func (w *walk) remove(inv *invocation) {
	inv.done.Store(true)
	i := slices.Index(w.parts, inv)
	if i < 0 {
		return
	}
	w.parts = slices.Delete(w.parts, i, i+1)
	if w.branches == nil {
		return
	}
	branches := make([][]policy.Cursor, 0, len(w.branches))
	for _, branch := range w.branches {
		branches = distinct(branches, slices.Delete(slices.Clone(branch), i, i+1))
	}
	w.settle(branches)
}

// settle makes branches the state of the walk.
func (w *walk) settle(branches [][]policy.Cursor) {
	if len(branches) > 1 {
		w.branches = branches
		return
	}
	w.branches = nil
	for i, inv := range w.parts {
		inv.cursor, inv.spare = branches[0][i], nil // spare may be part of a branch
	}
}

func distinct(branches [][]policy.Cursor, branch []policy.Cursor) [][]policy.Cursor {
	for _, other := range branches {
		if slices.EqualFunc(branch, other, slices.Equal[policy.Cursor]) {
			return branches
		}
	}
	return append(branches, branch)
}

// textsMax bounds the messages whose text is kept. When there are more, all are forgotten.
const textsMax = 1024

// text is m.Text() without building the same text again and again.
func (w *walk) text(m *policy.Message) string {
	var room [2 * policy.MessageTextMax]byte
	raw := m.AppendText(room[:0])
	if text, known := w.texts[string(raw)]; known {
		return text
	}
	text := policy.Printable(string(raw), policy.MessageTextMax)
	if len(raw) > policy.MessageTextMax {
		return text
	}
	if w.texts == nil || len(w.texts) >= textsMax {
		w.texts = map[string]string{}
	}
	w.texts[string(raw)] = text
	return text
}

// tailAt tells whether anything may be sent after the invocation's answer.
func (w *walk) tailAt(inv *invocation) bool {
	if w.branches == nil {
		return inv.function.TailAt(inv.cursor)
	}
	i := slices.Index(w.parts, inv)
	return slices.ContainsFunc(w.branches, func(branch []policy.Cursor) bool { return inv.function.TailAt(branch[i]) })
}

// beyond is the oldest tail when there are more than max.
func (w *walk) beyond(max int) (oldest *invocation) {
	count := 0
	for _, inv := range w.parts {
		if inv.tailing {
			if count++; oldest == nil {
				oldest = inv
			}
		}
	}
	if count <= max {
		return nil
	}
	return oldest
}

// try finds whose message m is. A message of a tail goes to the oldest answered invocation that allows it, every other
// one to those that are not answered; policies have no app edge in a tail. edge is an app edge: it belongs to exactly one invocation, which is told by the
// call when the function works on several requests at a time. suspect answers for a message that none of them allows.
//
// Nothing changes before take.
func (w *walk) try(call string, m *policy.Message, edge bool, suspect *invocation) step {
	for _, inv := range w.parts {
		if edge && !inv.runs(call) {
			continue
		}
		if again := inv.retry(m); again != nil {
			v := policy.Verdict{Allowed: true, Reason: policy.ReasonAllowed, States: inv.cursor.States()}
			return step{verdict: v, by: inv, again: again}
		}
	}
	running := 0
	for _, inv := range w.parts {
		if !inv.tailing {
			running++
		}
	}
	if w.branches == nil && running <= 1 {
		if s := w.tryOne(call, m, edge); s.by != nil {
			return s
		}
	} else if s := w.tryAll(call, m, edge); s.by != nil || s.verdict.Reason != "" {
		return s
	}
	return step{verdict: w.denial(call, m, edge, suspect), by: suspect}
}

// tryOne is try where at most one invocation is not answered, and nothing is uncertain.
func (w *walk) tryOne(call string, m *policy.Message, edge bool) step {
	var running *invocation
	for _, inv := range w.parts {
		if !inv.tailing {
			running = inv
			continue
		}
		if v, next := inv.function.StepTailInto(inv.spare, inv.cursor, m); v.Allowed {
			return step{verdict: v, by: inv, next: next}
		}
	}
	if running != nil && running.owns(call, edge) {
		if v, next := running.function.StepInto(running.spare, running.cursor, m); v.Allowed {
			return step{verdict: v, by: running, next: next}
		}
	}
	return step{}
}

func (w *walk) tryAll(call string, m *policy.Message, edge bool) step {
	before := w.branches
	if before == nil {
		own := make([]policy.Cursor, len(w.parts))
		for i, inv := range w.parts {
			own[i] = inv.cursor
		}
		before = [][]policy.Cursor{own}
	}
	var s step
	var by []*invocation
	move := func(branch []policy.Cursor, i int, v policy.Verdict, next policy.Cursor) {
		branch = slices.Clone(branch)
		branch[i] = next
		if s.branches = distinct(s.branches, branch); !slices.Contains(by, w.parts[i]) {
			by = append(by, w.parts[i])
		}
		if !s.verdict.Allowed {
			s.verdict, s.next = v, next
		}
	}
	for _, branch := range before {
		tail := false
		for i, inv := range w.parts {
			if inv.tailing && !tail {
				v, next := inv.function.StepTailInto(nil, branch[i], m)
				if tail = v.Allowed; tail {
					move(branch, i, v, next)
				}
			}
		}
		for i, inv := range w.parts {
			if !tail && !inv.tailing && inv.owns(call, edge) {
				if v, next := inv.function.StepInto(nil, branch[i], m); v.Allowed {
					move(branch, i, v, next)
				}
			}
		}
	}
	switch {
	case len(by) == 0:
		return step{}
	case len(s.branches) > branchesMax:
		return step{verdict: policy.Verdict{Reason: policy.ReasonTooLarge, Line: s.verdict.Line}, by: by[0]}
	case edge && len(by) > 1:
		return step{verdict: policy.Verdict{Reason: policy.ReasonUnknownCall, Line: s.verdict.Line}, by: by[0]}
	case len(by) == 1:
		s.by = by[0]
	default:
		s.by = &invocation{rule: by[0].rule, among: by}
	}
	return s
}

// owns tells whether the invocation may take an app edge of a call. Where there is one invocation at a time, the call is
// not asked for: what programs copy there is a label of the client's.
func (inv *invocation) owns(call string, edge bool) bool {
	return !edge || inv.function.MaxInflight <= 1 || call != "" && call == inv.call
}

// runs tells whether the invocation is not answered and may take an app edge of a call.
func (inv *invocation) runs(call string) bool { return !inv.tailing && inv.owns(call, true) }

// callback finds the function that the result of an asynchronous invoke goes to, which the policy says and not the program:
// that of the edge which m repeats, or else of the one line that allows m now. It says no when several lines do, with
// different callbacks. When none does, m becomes the first of them that there is.
func (w *walk) callback(call string, m *policy.Message, suspect *invocation) bool {
	found, allowed := false, false
	for _, inv := range w.parts {
		if !inv.runs(call) {
			continue
		}
		if again := inv.retryTo(m); again != nil {
			m.Callback = again.message.Callback
			return true
		}
		for i := range inv.function.Symbols {
			symbol := &inv.function.Symbols[i]
			possible := *m
			if possible.Callback = symbol.Callback; !symbol.Matches(&possible) || allowed && possible.Callback == m.Callback {
				continue
			}
			switch {
			case !w.try(call, &possible, true, suspect).verdict.Allowed:
				if !found {
					found, m.Callback = true, possible.Callback
				}
			case allowed:
				m.Callback = ""
				return false
			default:
				found, allowed, m.Callback = true, true, possible.Callback
			}
		}
	}
	return true
}

// denial says why m is not allowed, as suspect's CFG sees it.
func (w *walk) denial(call string, m *policy.Message, edge bool, suspect *invocation) policy.Verdict {
	cursor := suspect.cursor
	if w.branches != nil {
		cursor = w.branches[0][slices.Index(w.parts, suspect)]
	}
	v, _ := suspect.function.Step(cursor, m)
	if suspect.tailing {
		v, _ = suspect.function.StepTail(cursor, m)
	}
	owned := slices.ContainsFunc(w.parts, func(inv *invocation) bool { return !inv.tailing && inv.owns(call, edge) })
	if v.Allowed || edge && !owned && v.Reason == policy.ReasonOutOfOrder {
		return policy.Verdict{Reason: policy.ReasonUnknownCall, Line: v.Line, States: cursor.States()}
	}
	return v
}

// take makes the step. It tells which tail is complete by it.
func (w *walk) take(s *step, m *policy.Message) (complete *invocation) {
	switch {
	case s.again != nil:
		s.again.take()
		return nil
	case s.branches != nil:
		w.settle(s.branches)
	default:
		s.by.cursor, s.by.spare = s.next, s.by.cursor
	}
	if len(s.by.lost) > 0 {
		s.by.forget(m)
	}
	if m.Kind == policy.KindInvoke {
		s.by.edges++
	}
	if s.by.tailing && !w.tailAt(s.by) {
		return s.by
	}
	return nil
}
