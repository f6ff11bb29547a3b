package agent

import (
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"

	"kalium.dev/kalium/runtime/internal/frame"
)

// fakeStore is what several fake controllers share: it decides each step once, and gives the stored answer to a step that is
// asked again. A step that begins with f is denied.
type fakeStore struct {
	mu      sync.Mutex
	answers map[string]*frame.Answer // guarded by mu; by step
	asked   map[string]int           // guarded by mu; how often each step was
	ended   map[string]int           // guarded by mu; how often each invocation was
	strange []string                 // guarded by mu; what must not come: questions of an instance that this connection does not know
	known   map[net.Conn]map[string]bool
}

func newFakeStore() *fakeStore {
	return &fakeStore{answers: map[string]*frame.Answer{}, asked: map[string]int{}, ended: map[string]int{}, known: map[net.Conn]map[string]bool{}}
}

func (s *fakeStore) register(conn net.Conn, instance string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.known[conn] == nil {
		s.known[conn] = map[string]bool{}
	}
	s.known[conn][instance] = true
}

// take answers a question, and tells whether m is one for it.
func (s *fakeStore) take(c *fakeController, conn net.Conn, id uint32, m frame.Message) bool {
	var answer *frame.Answer
	switch m := m.(type) {
	case *frame.Start:
		answer = s.decide(conn, m.Step, m.Identity.Instance)
	case *frame.Invoke:
		answer = s.decide(conn, m.Step, m.Identity.Instance)
	case *frame.End:
		s.mu.Lock()
		s.ended[m.Invocation]++
		s.mu.Unlock()
		return true
	default:
		return false
	}
	c.send(conn, id, answer)
	return true
}

func (s *fakeStore) decide(conn net.Conn, step, instance string) *frame.Answer {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.known[conn][instance] {
		s.strange = append(s.strange, fmt.Sprintf("a question of %s before its registration", instance))
	}
	s.asked[step]++
	if s.answers[step] == nil {
		answer := &frame.Answer{Allowed: true, Reason: "allowed", Call: "call-" + step, Invocation: "invocation-" + step}
		if strings.HasPrefix(step, "f") {
			answer = &frame.Answer{Reason: "edge_not_allowed"}
		}
		s.answers[step] = answer
	}
	return s.answers[step]
}

// ends counts how often the end of an invocation was told.
func (s *fakeStore) ends(invocation string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ended[invocation]
}

// times counts how often a step was asked.
func (s *fakeStore) times(step string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.asked[step]
}

// said is what must not come and came.
func (s *fakeStore) said() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.strange)
}

// steps counts those that were decided.
func (s *fakeStore) steps() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.answers)
}
