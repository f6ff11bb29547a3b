// Package wire holds what its parsers share: how they say that bytes are missing, and how they refuse.
//
// Parsers are pure and know nothing of gVisor. Each reads one unit from the front of a byte stream. A unit that
// another reader of the same bytes might understand differently is refused, because the verdict is about what the
// server will do and not about what the bytes could also mean.
package wire

import (
	"errors"
	"fmt"

	"kalium.dev/kalium/runtime/internal/policy"
)

// ErrShort means that the front of the stream is a prefix of a unit: hold the bytes and ask again with more. The
// holder's own bounds end the waiting.
var ErrShort = errors.New("wire: more bytes are needed")

// Error is the only error besides ErrShort that comes out of a parser. It is final: more bytes do not mend it.
type Error struct {
	Reason policy.Reason // malformed, unsupported, too_large, sni_mismatch or no_key
	Text   string        // what was found; printable, bounded, never payload
}

// Error implements error.
func (e *Error) Error() string { return fmt.Sprintf("%s: %s", e.Reason, e.Text) }

const textMax = 200

// Malformed refuses bytes that break the protocol's grammar, or ours, which is narrower.
func Malformed(format string, args ...any) *Error {
	return newError(policy.ReasonMalformed, format, args)
}

// Unsupported refuses a part of the protocol that we understand too little to judge.
func Unsupported(format string, args ...any) *Error {
	return newError(policy.ReasonUnsupported, format, args)
}

// TooLarge refuses a unit beyond its bound.
func TooLarge(format string, args ...any) *Error {
	return newError(policy.ReasonTooLarge, format, args)
}

func newError(reason policy.Reason, format string, args []any) *Error {
	return &Error{Reason: reason, Text: policy.Printable(fmt.Sprintf(format, args...), textMax)}
}
