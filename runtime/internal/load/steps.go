package load

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
)

// Plan is one measurement of an app whose function Front may invoke Leaf so often in one call.
type Plan struct {
	App, Front, Leaf string
	Version          int
	Edges            int  // invokes of Leaf in one call
	KeepOpen         bool // leaves end when the call does, not before the next one
	Lanes            int  // calls under way at a time, each with one open question
	Seconds          float64
	Calls            int  // the measurement ends after so many calls as well; 0 for no such end
	WarmUp           int  // calls that are not measured
	Floor            bool // who answers is an echo: there is no hello, no registration and nothing to unregister
}

// Result of a measurement.
type Result struct {
	Steps   int // answered questions
	Frames  int // the ENDs too
	Calls   int
	Seconds float64
	Step    Spread            // of every question
	Invoke  map[string]Spread // of INVOKE, by how many edges of the call came before: "1", "10", "100", "1000"
}

// windows of a path in which an INVOKE's cost is told apart, by the number of the edge.
var windows = [...]struct {
	name      string
	low, high int
}{{"1", 1, 5}, {"10", 8, 12}, {"100", 90, 110}, {"1000", 950, 1000}}

// steps is a Plan that runs.
type steps struct {
	plan Plan
	// front and leaf are the same connection for an agent, and two for two guards.
	front, leaf *wire
	groups      []group
	lanes       []lane
	reader      reader
	step        uint64
	result      Result
	spans       []int64
	byWindow    [len(windows)][]int64
	measuring   bool
	stopping    bool
	open        int
}

// group is what lanes have in common that ask for the same two instances.
type group struct{ startFront, startLeaf, invoke, endFront, endLeaf template }

// groupLanes bounds the lanes of an instance: a controller lets an instance have 256 invocations.
const groupLanes = 128

func (s *steps) group(lane int) *group { return &s.groups[lane/groupLanes] }

type phase uint8

const (
	starting phase = iota // the front's START is open
	invoking              // an INVOKE is
	joining               // a leaf's START is
)

type lane struct {
	phase phase
	edge  int
	front grant
	leaf  grant
	kept  [][32]byte // invocations of leaves that are open
	asked time.Time
}

// Controller measures steps over one connection to a controller, as an agent of node. Questions of different calls are
// in one stream.
func Controller(target Target, node string, plan Plan) (*Result, error) {
	conn, err := target.dial()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	w := newWire(conn)
	var identities []frame.Identity
	for i := 0; i < plan.Lanes; i += groupLanes {
		for _, function := range [...]string{plan.Front, plan.Leaf} {
			identities = append(identities, frame.Identity{Instance: fmt.Sprintf("load-%s-%s-%d", node, function, i/groupLanes), App: plan.App, Function: function})
		}
	}
	if !plan.Floor {
		if err := hello(w, node, identities...); err != nil {
			return nil, err
		}
	}
	s := &steps{plan: plan, front: w, leaf: w}
	if err := s.make(identities...); err != nil {
		return nil, err
	}
	return s.run()
}

func hello(w *wire, node string, identities ...frame.Identity) error {
	answer, err := w.ask(1, &frame.AgentHello{Node: node, Run: "00000000000000ee", Protos: frame.Protos()})
	if err != nil {
		return err
	}
	if welcome, ok := answer.(*frame.ControllerWelcome); !ok || !welcome.OK {
		return fmt.Errorf("the controller's welcome: %+v", answer)
	}
	for i, id := range identities {
		answer, err := w.ask(uint32(i+2), &frame.Register{Instance: id.Instance, App: id.App, Function: id.Function, Image: "load"})
		if err != nil {
			return err
		}
		if registered, ok := answer.(*frame.Answer); !ok || !registered.Allowed {
			return fmt.Errorf("registration of %s: %+v", id.Function, answer)
		}
	}
	return nil
}

// Edges measures app edges as two guards ask for them: over two connections to an agent's guard socket, or to a relay in
// the agent's place. containers are those that were registered for the front and the leaf.
func Edges(socket string, containers [2]string, plan Plan) (*Result, error) {
	s := &steps{plan: plan}
	for i, function := range [...]string{plan.Front, plan.Leaf} {
		conn, err := net.DialTimeout("unix", socket, dialTimeout)
		if err != nil {
			return nil, err
		}
		defer conn.Close()
		w := newWire(conn)
		if !plan.Floor {
			said := &frame.Hello{Protos: frame.Protos(), Container: containers[i], App: plan.App, Function: function}
			answer, err := w.ask(1, said)
			if err != nil {
				return nil, fmt.Errorf("hello of %s: %w", function, err)
			}
			if welcome, ok := answer.(*frame.Welcome); !ok || !welcome.OK {
				return nil, fmt.Errorf("the agent's welcome of %s: %+v", function, answer)
			}
		}
		if i == 0 {
			s.front = w
		} else {
			s.leaf = w
		}
	}
	if err := s.make(frame.Identity{}, frame.Identity{}); err != nil {
		return nil, err
	}
	return s.run()
}

// make makes the groups of identities, which are pairs of a front and a leaf.
func (s *steps) make(identities ...frame.Identity) error {
	for i := 0; i < len(identities); i += 2 {
		made, err := s.makeGroup(identities[i], identities[i+1])
		if err != nil {
			return err
		}
		s.groups = append(s.groups, made)
	}
	return nil
}

func (s *steps) makeGroup(front, leaf frame.Identity) (g group, err error) {
	p := s.plan
	parts := []struct {
		into    *template
		id      uint32
		message frame.Message
	}{
		{&g.startFront, 1, &frame.Start{Step: holeStep, Version: p.Version, Identity: front}},
		{&g.startLeaf, 1, &frame.Start{Step: holeStep, Token: holeToken, Version: p.Version, Identity: leaf}},
		{&g.invoke, 1, &frame.Invoke{Step: holeStep, Call: holeCall, Invocation: holeInvocation, Callee: p.Leaf, Version: p.Version, Identity: front}},
		{&g.endFront, 0, &frame.End{Call: holeCall, Invocation: holeInvocation, Outcome: "answered", Identity: front}},
		{&g.endLeaf, 0, &frame.End{Call: holeCall, Invocation: holeInvocation, Outcome: "answered", Identity: leaf}},
	}
	for _, part := range parts {
		if *part.into, err = newTemplate(part.id, part.message); err != nil {
			return g, err
		}
	}
	return g, nil
}

// run plays the plan. With one connection everything is done in one loop; with two there is at most one lane, whose
// answers are waited for where its question went.
func (s *steps) run() (*Result, error) {
	two := s.front != s.leaf
	if two && s.plan.Lanes != 1 {
		return nil, fmt.Errorf("%d lanes over two connections, where there may be one", s.plan.Lanes)
	}
	s.lanes = make([]lane, s.plan.Lanes)
	s.step = rand.Uint64() // a step that was asked before would get the answer of then
	s.result.Invoke = map[string]Spread{}
	began := time.Now()
	s.measuring = s.plan.WarmUp == 0
	for i := range s.lanes {
		s.begin(i)
	}
	measuredFrom := began
	for s.open > 0 {
		if err := s.front.flush(); err != nil {
			return nil, err
		}
		from := s.front
		if two {
			if err := s.leaf.flush(); err != nil {
				return nil, err
			}
			if s.lanes[0].phase == joining {
				from = s.leaf
			}
		}
		if err := from.read(func(raw []byte) error { return s.answered(raw) }); err != nil {
			return nil, err
		}
		if !s.measuring && s.result.Calls >= s.plan.WarmUp {
			s.result.Calls, s.result.Steps, s.result.Frames, s.measuring, measuredFrom = 0, 0, 0, true, time.Now()
		}
		elapsed := time.Since(measuredFrom).Seconds()
		s.stopping = s.stopping || s.measuring && (elapsed >= s.plan.Seconds || s.plan.Calls > 0 && s.result.Calls >= s.plan.Calls)
	}
	if err := s.front.flush(); err != nil {
		return nil, err
	}
	s.result.Seconds = time.Since(measuredFrom).Seconds()
	s.result.Step = spreadOf(s.spans)
	for i, window := range windows {
		if len(s.byWindow[i]) > 0 {
			s.result.Invoke[window.name] = spreadOf(s.byWindow[i])
		}
	}
	return &s.result, nil
}

func (s *steps) begin(i int) {
	l := &s.lanes[i]
	l.phase, l.edge, l.kept = starting, 0, l.kept[:0]
	s.open++
	s.ask(i, s.front, &s.group(i).startFront, nil)
}

func (s *steps) ask(i int, w *wire, t *template, token []byte) {
	l := &s.lanes[i]
	s.step++
	w.out = t.appendTo(w.out, uint32(i+1), s.step, l.front.call[:], l.front.invocation[:], token)
	s.result.Frames++
	l.asked = time.Now()
}

func (s *steps) tell(w *wire, t *template, call, invocation []byte) {
	w.out = t.appendTo(w.out, 0, 0, call, invocation, nil)
	s.result.Frames++
}

func (s *steps) answered(raw []byte) error {
	if raw[3] != byte(frame.TypeAnswer) {
		return nil // a lease, names or a policy
	}
	id := binary.BigEndian.Uint32(raw[4:])
	if id == 0 || int(id) > len(s.lanes) {
		return fmt.Errorf("an answer with id %d", id)
	}
	i := int(id - 1)
	l := &s.lanes[i]
	span := time.Since(l.asked).Nanoseconds()
	into := &l.front
	var granted grant
	switch l.phase {
	case invoking:
		into = &granted
	case joining:
		into = &l.leaf
	}
	if _, err := s.reader.read(raw, into); err != nil {
		return err
	}
	s.result.Steps++
	if s.measuring {
		s.spans = append(s.spans, span)
	}
	switch l.phase {
	case starting:
		s.next(i)
	case invoking:
		if s.measuring {
			for w := range windows {
				if windows[w].low <= l.edge && l.edge <= windows[w].high {
					s.byWindow[w] = append(s.byWindow[w], span)
				}
			}
		}
		l.phase = joining
		s.ask(i, s.leaf, &s.group(i).startLeaf, granted.token[:])
	case joining:
		if s.plan.KeepOpen {
			l.kept = append(l.kept, l.leaf.invocation)
		} else {
			s.tell(s.leaf, &s.group(i).endLeaf, l.leaf.call[:], l.leaf.invocation[:])
		}
		s.next(i)
	}
	return nil
}

// next takes the next edge of a lane's call, or ends it and begins another one.
func (s *steps) next(i int) {
	l := &s.lanes[i]
	if l.edge < s.plan.Edges {
		l.edge++
		l.phase = invoking
		s.ask(i, s.front, &s.group(i).invoke, nil)
		return
	}
	for _, invocation := range l.kept {
		s.tell(s.leaf, &s.group(i).endLeaf, l.front.call[:], invocation[:])
	}
	s.tell(s.front, &s.group(i).endFront, l.front.call[:], l.front.invocation[:])
	s.result.Calls++
	s.open--
	if !s.stopping {
		s.begin(i)
	}
}
