package guardtest

import (
	"fmt"
	"sync"

	"kalium.dev/kalium/runtime/internal/frame"
)

// Tokens is what the guards of a site have in common: a controller that grants every edge, with a token for its callee that
// starts it once.
type Tokens struct {
	mu      sync.Mutex
	issued  int
	pending map[string]bound
}

type bound struct{ app, callee string }

// Controller is how one guard sees it. Without a token, entries start, as the policy of this package has them.
func (s *Tokens) Controller(app, function string) *Controller {
	c := NewController()
	c.OnInvoke = func(m *frame.Invoke) (*frame.Answer, error) {
		return &frame.Answer{Allowed: true, Reason: "allowed", Token: s.Issue(app, m.Callee)}, nil
	}
	c.OnStart = func(m *frame.Start) (*frame.Answer, error) {
		switch {
		case m.Token == "" && function == Function:
			return GrantStart(m)
		case m.Token == "":
			return &frame.Answer{Reason: "not_an_entry"}, nil
		case !s.take(m.Token, bound{app, function}):
			return &frame.Answer{Reason: "bad_token"}, nil
		}
		return GrantStart(m)
	}
	return c
}

// Issue makes a token for a function.
func (s *Tokens) Issue(app, callee string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pending == nil {
		s.pending = map[string]bound{}
	}
	s.issued++
	token := fmt.Sprintf("%032x", 0xfeed0000+s.issued)
	s.pending[token] = bound{app, callee}
	return token
}

func (s *Tokens) take(token string, by bound) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pending[token] != by {
		return false
	}
	delete(s.pending, token)
	return true
}

// Expire makes all tokens stale.
func (s *Tokens) Expire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.pending)
}
