package agent

import (
	"fmt"

	"kalium.dev/kalium/runtime/internal/policy"
)

// Exit codes of the program: those of kalium/errors.py.
const (
	ExitDone        = 0
	ExitNo          = 1
	ExitUsage       = 2
	ExitEnvironment = 3
)

// Error is what a person has to act on.
type Error struct {
	Code      string // area.what, stable
	Attempted string // begins with "cannot"
	Found     string
	Next      string
	Exit      int
}

// Error implements error with the two lines that every program of ours prints.
func (e *Error) Error() string {
	return fmt.Sprintf("error[%s]: %s: %s\nnext: %s", e.Code, e.Attempted, e.Found, e.Next)
}

func environment(code, attempted, next, format string, args ...any) *Error {
	return &Error{
		Code: code, Attempted: attempted, Next: next, Exit: ExitEnvironment,
		Found: policy.Printable(fmt.Sprintf(format, args...), 2*logTextMax),
	}
}
