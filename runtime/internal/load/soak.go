package load

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/policy"
)

// SoakPlan is calls of the app "soak" (tests/control/soak.py has its policy) through several agents. Each call goes one of
// the policy's ways; at random places it first tries something that the policy forbids, and at others it asks a question
// again. What every answer has to be is known from the call alone.
type SoakPlan struct {
	Folders []string // of the agents
	Calls   int      // under way at a time
	Rate    float64  // questions a second that are aimed at
	Seconds float64
	Seed    uint64
	Denials string // file of the verdicts that were told, one line each
	// TokenLife is how long a token of a synchronous edge is good for.
	TokenLife time.Duration
}

// Soaked is what came of it. FalseAllows, CrossTalk, LostAnswers and Unexpected have to be 0.
type Soaked struct {
	Calls, Steps, Repeats, DenialsExpected, DenialsSeen, Unavailable, Abandoned, Verdicts int64
	FalseAllows, CrossTalk, LostAnswers, Unexpected                                       int64
	Instances, Replaced                                                                   int64    // of each agent; and after agents had died, of all
	Late                                                                                  int64    // calls whose token was presented after its time
	First                                                                                 []string // a few sentences about what should not have been
}

const (
	soakApp, otherApp = "soak", "soak-other"
	instancesOfSoak   = 24 // of a function and agent: they start one invocation at a time, and all calls may want the same one
	patience          = 30 * time.Second
	repeatShare       = 0.05
	attemptShare      = 0.15
	firstMax          = 20
	callsOfFront      = 100 // that an instance of the front has when one agent has all calls
)

var soakFunctions = []string{"front", "a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "n"}

type soak struct {
	plan  SoakPlan
	think time.Duration
	sums  struct {
		calls, steps, repeats, expected, seen, unavailable, abandoned, verdicts atomic.Int64
		allows, crossed, lost, unexpected, replaced, late                       atomic.Int64
	}
	ctx context.Context

	mu        sync.Mutex
	guards    map[string][]*guard // by app and function
	made      int
	instances int64               // of each agent
	known     map[string]struct{} // invocations that were granted
	first     []string
	denials   *os.File
}

// Soak plays the plan and tells progress on the way.
func Soak(plan SoakPlan, progress func(Soaked)) (*Soaked, error) {
	denials, err := os.Create(plan.Denials)
	if err != nil {
		return nil, err
	}
	defer denials.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(plan.Seconds*float64(time.Second)))
	defer cancel()
	s := &soak{
		plan: plan, think: time.Duration(float64(plan.Calls) / plan.Rate * float64(time.Second)),
		ctx: ctx, guards: map[string][]*guard{}, known: map[string]struct{}{}, denials: denials,
	}
	if err := s.populate(); err != nil {
		return nil, err
	}
	var calls sync.WaitGroup
	for i := range plan.Calls {
		calls.Go(func() {
			random := rand.New(rand.NewPCG(plan.Seed, uint64(i)))
			for ctx.Err() == nil {
				(&soakCall{s: s, random: random, tokens: map[string]granted{}}).run()
			}
		})
	}
	done := make(chan struct{})
	go func() { calls.Wait(); close(done) }()
	for ticker := time.NewTicker(5 * time.Second); ; {
		select {
		case <-ticker.C:
			progress(s.soaked())
			s.replace()
		case <-done:
			ticker.Stop()
			sum := s.soaked()
			return &sum, nil
		}
	}
}

func (s *soak) soaked() Soaked {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := &s.sums
	return Soaked{
		t.calls.Load(), t.steps.Load(), t.repeats.Load(), t.expected.Load(), t.seen.Load(), t.unavailable.Load(), t.abandoned.Load(),
		t.verdicts.Load(), t.allows.Load(), t.crossed.Load(), t.lost.Load(), t.unexpected.Load(),
		s.instances, t.replaced.Load(), t.late.Load(), append([]string(nil), s.first...),
	}
}

// populate makes every instance of every function on every agent.
func (s *soak) populate() error {
	for _, folder := range s.plan.Folders {
		for _, function := range soakFunctions {
			n := instancesOfSoak
			if function == "front" {
				n = max(n, s.plan.Calls/callsOfFront)
			}
			for range n {
				if err := s.add(folder, soakApp, function, ""); err != nil {
					return err
				}
			}
		}
		if err := errors.Join(s.add(folder, otherApp, "front", ""), s.add(folder, otherApp, "a", "")); err != nil {
			return err
		}
	}
	s.instances = int64(s.made / len(s.plan.Folders))
	return nil
}

// add makes an instance, in the place of the container that is gone, if any, as an engine does. One that fails half-way is tried again
// under its own name: what the agent has registered stays one.
func (s *soak) add(folder, app, function, gone string) error {
	s.mu.Lock()
	s.made++
	container := fmt.Sprintf("soak-%s-%s-%d", filepath.Base(folder), function, s.made)
	s.mu.Unlock()
	var g *guard
	for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		var err error
		if gone != "" {
			err = tellAgent(folder, map[string]string{"op": "unregister", "container": gone})
		}
		if err == nil {
			g, err = newGuard(folder, app, function, container)
		}
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			return err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.guards[app+" "+function] = append(s.guards[app+" "+function], g)
	return nil
}

// replace makes an instance in the place of each whose agent has died. An agent that is not back yet is tried later.
func (s *soak) replace() {
	type lost struct{ folder, app, function, container string }
	var all []lost
	s.mu.Lock()
	for key, guards := range s.guards {
		kept := guards[:0]
		for _, g := range guards {
			if !g.gone() {
				kept = append(kept, g)
				continue
			}
			for _, folder := range s.plan.Folders {
				if filepath.Base(folder) == g.agent {
					all = append(all, lost{folder, g.app, g.function, g.container})
				}
			}
		}
		s.guards[key] = kept
	}
	s.mu.Unlock()
	for _, each := range all {
		s.sums.replaced.Add(1)
		if err := s.add(each.folder, each.app, each.function, each.container); err != nil {
			s.wrong(&s.sums.unexpected, "no instance of %s: %v", each.function, err)
		}
	}
}

func (s *soak) pick(random *rand.Rand, app, function string) *guard {
	for {
		s.mu.Lock()
		guards := s.guards[app+" "+function]
		if len(guards) > 0 {
			g := guards[random.IntN(len(guards))]
			s.mu.Unlock()
			if !g.gone() {
				return g
			}
		} else {
			s.mu.Unlock()
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (s *soak) wrong(counter *atomic.Int64, format string, arguments ...any) {
	counter.Add(1)
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.first) < firstMax {
		s.first = append(s.first, fmt.Sprintf(format, arguments...))
	}
}

// begun is a granted invocation and whose it is.
type begun struct {
	by   *guard
	id   string
	hold bool
}

// What ends a call early: its way cannot be known any more, since an instance of it has died; or its token was over when its turn came.
var (
	errAbandoned = errors.New("abandoned")
	errLate      = errors.New("late")
)

// granted is between when the grant of a token was.
type granted struct{ asked, answered time.Time }

type soakCall struct {
	s      *soak
	random *rand.Rand
	id     string
	used   []*guard
	tokens map[string]granted // of synchronous edges
}

func (c *soakCall) run() {
	c.pause(1) // also so that what fails at once is not tried at once
	err := c.walk()
	switch {
	case err == nil:
		c.s.sums.calls.Add(1)
	case errors.Is(err, errAbandoned):
		c.s.sums.abandoned.Add(1)
	case errors.Is(err, errLate):
		c.s.sums.late.Add(1)
	default:
		c.s.wrong(&c.s.sums.unexpected, "call %s: %v", c.id, err)
	}
}

// walk goes one way through the policy.
func (c *soakCall) walk() error {
	front, err := c.start("front", "")
	if err != nil {
		return err
	}
	c.try(front, "edge_not_allowed", "skip", c.invocation(front, "j"))
	if err := c.leaf(front, "a"); err != nil {
		return err
	}
	c.try(front, "edge_not_allowed", "repeat", c.invocation(front, "a"))
	branch := []string{"b", "c"}[c.random.IntN(2)]
	if branch == "b" {
		err = c.nested(front)
	} else {
		err = c.leaf(front, "c")
	}
	if err != nil {
		return err
	}
	c.try(front, "edge_not_allowed", "the other branch", c.invocation(front, map[string]string{"b": "c", "c": "b"}[branch]))
	if c.random.IntN(2) == 0 {
		if err := c.leaf(front, "d"); err != nil {
			return err
		}
	}
	if err := c.join(front); err != nil {
		return err
	}
	if err := c.queued(front); err != nil {
		return err
	}
	for range c.random.IntN(4) {
		if err := c.leaf(front, "i"); err != nil {
			return err
		}
	}
	c.try(front, "edge_not_allowed", "invent", c.invocation(front, "n"))
	if err := c.again(front); err != nil {
		return err
	}
	c.try(front, "edge_not_allowed", "beyond the end", c.invocation(front, "i"))
	return c.end(front)
}

// leaf invokes a function that invokes nothing, and sees it to its end.
func (c *soakCall) leaf(by begun, function string) error {
	token, _, err := c.invoke(c.invocation(by, function), by)
	if err != nil {
		return err
	}
	if c.random.Float64() < attemptShare {
		c.misuse(token, function)
	}
	live, err := c.start(function, token)
	if err != nil {
		return err
	}
	if c.random.Float64() < attemptShare {
		c.refused(live.by, "bad_token", "a token that was used", &frame.Start{Step: c.step(), Token: token, Version: 1})
	}
	if c.random.Float64() < attemptShare {
		c.refused(live.by, "unknown_call", "another's invocation", c.invocation(begun{by: live.by, id: by.id}, "a"))
	}
	return c.end(live)
}

// misuse presents a token that is good for one function in every wrong way.
func (c *soakCall) misuse(token, function string) {
	random, s := c.random, c.s
	altered := []byte(token)
	at := random.IntN(len(altered))
	altered[at] = "0123456789abcdef"[(int(altered[at])+1+random.IntN(14))%16]
	if string(altered) != token {
		c.refused(s.pick(random, soakApp, function), "bad_token", "an altered token", &frame.Start{Step: c.step(), Token: string(altered), Version: 1})
	}
	other := soakFunctions[1+random.IntN(len(soakFunctions)-1)]
	if other != function {
		c.refused(s.pick(random, soakApp, other), "bad_token", "a token for another function", &frame.Start{Step: c.step(), Token: token, Version: 1})
	}
	c.refused(s.pick(random, otherApp, "a"), "bad_token", "a token of another app", &frame.Start{Step: c.step(), Token: token, Version: 1})
	c.refused(s.pick(random, soakApp, function), "not_an_entry", "no token", &frame.Start{Step: c.step(), Version: 1})
}

func (c *soakCall) nested(front begun) error {
	token, _, err := c.invoke(c.invocation(front, "b"), front)
	if err != nil {
		return err
	}
	live, err := c.start("b", token)
	if err != nil {
		return err
	}
	if err := c.leaf(live, "n"); err != nil {
		return err
	}
	c.try(live, "edge_not_allowed", "repeat inside", c.invocation(live, "n"))
	return c.end(live)
}

// join invokes two branches, whose answers both have to be there before anything else.
func (c *soakCall) join(front begun) error {
	branches := []string{"e", "f"}
	c.random.Shuffle(2, func(i, j int) { branches[i], branches[j] = branches[j], branches[i] })
	var live []begun
	for _, function := range branches {
		token, _, err := c.invoke(c.invocation(front, function), front)
		if err != nil {
			return err
		}
		each, err := c.start(function, token)
		if err != nil {
			return err
		}
		if !each.hold {
			return fmt.Errorf("the start of %s, which a join needs, does not hold its answer", function)
		}
		live = append(live, each)
	}
	next := c.invocation(front, "g")
	next.Asynchronous, next.Callback = true, "h"
	for _, each := range live {
		again := *next
		again.Step = c.step()
		c.try(front, "edge_not_allowed", "before the join", &again)
		if err := c.end(each); err != nil {
			return err
		}
	}
	return nil
}

// queued invokes by the queue, with a callback.
func (c *soakCall) queued(front begun) error {
	question := c.invocation(front, "g")
	question.Asynchronous, question.Callback = true, "h"
	token, callback, err := c.invoke(question, front)
	if err != nil {
		return err
	}
	live, err := c.start("g", token)
	if err != nil {
		return err
	}
	if !live.hold {
		return errors.New("the start of g, which has a callback, does not hold its answer")
	}
	if c.random.Float64() < attemptShare {
		c.refused(c.s.pick(c.random, soakApp, "h"), "bad_token", "a callback before the end", &frame.Start{Step: c.step(), Token: callback, Version: 1})
	}
	if err := c.end(live); err != nil {
		return err
	}
	if live, err = c.start("h", callback); err != nil {
		return err
	}
	return c.end(live)
}

// again invokes j, whose line allows one retry.
func (c *soakCall) again(front begun) error {
	token, _, err := c.invoke(c.invocation(front, "j"), front)
	if err != nil {
		return err
	}
	if c.random.IntN(2) == 0 {
		question := c.invocation(front, "j")
		question.Retry = true
		spent := token
		if token, _, err = c.invoke(question, front); err != nil {
			return err
		}
		c.refused(c.s.pick(c.random, soakApp, "j"), "bad_token", "the token before the retry", &frame.Start{Step: c.step(), Token: spent, Version: 1})
		question = c.invocation(front, "j")
		question.Retry = true
		c.try(front, "edge_not_allowed", "a second retry", question)
	}
	live, err := c.start("j", token)
	if err != nil {
		return err
	}
	return c.end(live)
}

func (c *soakCall) step() string { return fmt.Sprintf("%016x", c.random.Uint64()) }

func (c *soakCall) invocation(by begun, callee string) *frame.Invoke {
	return &frame.Invoke{Step: c.step(), Call: c.id, Invocation: by.id, Callee: callee, Version: 1}
}

// pause lets others have their turn: so long on average that all calls together ask Rate questions a second.
func (c *soakCall) pause(share float64) {
	wait := time.NewTimer(time.Duration(share * 2 * c.random.Float64() * float64(c.s.think)))
	defer wait.Stop()
	<-wait.C
}

// ask asks until somebody answers. A question keeps its step, so it may be asked again however its answer got lost.
func (c *soakCall) ask(g *guard, m frame.Message) (*frame.Answer, error) {
	for deadline := time.Now().Add(patience); ; {
		answer, err := g.ask(m)
		if err != nil {
			return nil, errAbandoned
		}
		switch policy.Reason(answer.Reason) {
		case policy.ReasonControllerUnavailable, policy.ReasonOverloaded, policy.ReasonHeldTooLong: // nothing was decided
		default:
			c.s.sums.steps.Add(1)
			return answer, nil
		}
		c.s.sums.unavailable.Add(1)
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("nobody has answered for %v: %s", patience, answer.Detail)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// repeat asks an answered question again, on the same connection: the answer has to be the same.
func (c *soakCall) repeat(g *guard, m frame.Message, before *frame.Answer) error {
	if c.random.Float64() >= repeatShare {
		return nil
	}
	now, err := c.ask(g, m)
	if err != nil {
		return err
	}
	c.s.sums.repeats.Add(1)
	if now.Allowed != before.Allowed || now.Reason != before.Reason || now.Call != before.Call || now.Invocation != before.Invocation || now.Token != before.Token {
		c.s.wrong(&c.s.sums.lost, "call %s: a step that was answered %t %s is answered %t %s", c.id, before.Allowed, before.Reason, now.Allowed, now.Reason)
	}
	return nil
}

// dead tells whether an instance of this call has died: then nobody knows which answers are right.
func (c *soakCall) dead() bool {
	for _, g := range c.used {
		if g.gone() {
			return true
		}
	}
	return false
}

func (c *soakCall) denied(what string, answer *frame.Answer) error {
	if c.dead() {
		return errAbandoned
	}
	return fmt.Errorf("%s is denied: %s: %s", what, answer.Reason, answer.Detail)
}

func (c *soakCall) start(function, token string) (begun, error) {
	g := c.s.pick(c.random, soakApp, function)
	c.used = append(c.used, g)
	m := &frame.Start{Step: c.step(), Token: token, Version: 1}
	g.one.Lock()
	defer g.one.Unlock()
	asked := time.Now()
	answer, err := c.ask(g, m)
	if err != nil {
		return begun{}, err
	}
	grant, isTimed := c.tokens[token]
	if !answer.Allowed {
		if isTimed && policy.Reason(answer.Reason) == policy.ReasonBadToken && time.Since(grant.asked) >= c.s.plan.TokenLife {
			return begun{}, errLate
		}
		return begun{}, c.denied("the start of "+function, answer)
	}
	if isTimed && asked.Sub(grant.answered) > c.s.plan.TokenLife {
		c.s.wrong(&c.s.sums.allows, "call %s: the start of %s is allowed with a token whose time is over", c.id, function)
	}
	c.s.mu.Lock()
	_, twice := c.s.known[answer.Invocation]
	c.s.known[answer.Invocation] = struct{}{}
	c.s.mu.Unlock()
	if twice || answer.Invocation == "" || c.id != "" && answer.Call != c.id || token == "" && c.id != "" {
		c.s.wrong(&c.s.sums.crossed, "call %s: the start of %s is answered with call %s, invocation %s", c.id, function, answer.Call, answer.Invocation)
	}
	c.id = answer.Call
	if err := c.repeat(g, m, answer); err != nil {
		return begun{}, err
	}
	return begun{g, answer.Invocation, answer.Hold}, nil
}

func (c *soakCall) invoke(m *frame.Invoke, by begun) (token, callback string, err error) {
	c.pause(1)
	asked := time.Now()
	answer, err := c.ask(by.by, m)
	if err != nil {
		return "", "", err
	}
	if !answer.Allowed {
		return "", "", c.denied("invoke "+m.Callee, answer)
	}
	if !m.Asynchronous {
		c.tokens[answer.Token] = granted{asked, time.Now()}
	}
	if answer.Call != c.id || answer.Invocation != by.id || answer.Token == "" || (m.Callback != "") != (answer.Callback != "") {
		c.s.wrong(&c.s.sums.crossed, "call %s: invoke %s is answered with call %s, invocation %s", c.id, m.Callee, answer.Call, answer.Invocation)
	}
	return answer.Token, answer.Callback, c.repeat(by.by, m, answer)
}

func (c *soakCall) end(live begun) error {
	if !live.hold {
		if live.by.tell(&frame.End{Call: c.id, Invocation: live.id, Outcome: "answered"}) != nil {
			return errAbandoned
		}
		return nil
	}
	live.by.one.Lock()
	answer, err := c.ask(live.by, &frame.Finish{Call: c.id, Invocation: live.id, Outcome: "answered"})
	live.by.one.Unlock()
	if err == nil && !answer.Allowed {
		err = c.denied("the end of "+live.by.function, answer)
	}
	return err
}

// try sometimes asks for what the policy forbids here.
func (c *soakCall) try(by begun, reason, what string, m *frame.Invoke) {
	if c.random.Float64() < attemptShare {
		c.refused(by.by, reason, what, m)
	}
}

// refused asks for what has to be denied, and tells the agent of the denial as a guard does.
func (c *soakCall) refused(g *guard, reason, what string, m frame.Message) {
	if _, isStart := m.(*frame.Start); isStart {
		g.one.Lock()
		defer g.one.Unlock()
	}
	answer, err := c.ask(g, m)
	if err != nil || c.dead() {
		return
	}
	c.s.sums.expected.Add(1)
	if answer.Allowed {
		c.s.wrong(&c.s.sums.allows, "call %s: %s is allowed", c.id, what)
		return
	}
	if answer.Reason != reason {
		c.s.wrong(&c.s.sums.unexpected, "call %s: %s is denied with %s in place of %s: %s", c.id, what, answer.Reason, reason, answer.Detail)
		return
	}
	c.s.sums.seen.Add(1)
	message := fmt.Sprintf("soak %d", c.s.sums.verdicts.Add(1))
	record := frame.VerdictRecord{
		Event: frame.EventVerdict, Mode: "enforce", PolicyVersion: 1, Kind: "invoke", Message: message, Reason: answer.Reason,
		Expected: []string{}, States: []int{},
	}
	if g.tell(&frame.Verdict{Record: record}) == nil {
		c.s.mu.Lock()
		defer c.s.mu.Unlock()
		fmt.Fprintf(c.s.denials, "%s\t%s\t%d\n", g.agent, message, time.Now().UnixMilli())
	}
}
