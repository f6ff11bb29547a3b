// Package frame is the codec of the protocol between guard, agent and controller (docs/reference/protocol.md).
//
// It is pure: bytes go in and messages come out, and the other way round. A frame is
//
//	0      2        3     4     8         12
//	+------+--------+-----+-----+---------+----------------
//	| "KL" | 1 (u8) | u8  | u32 | u32     | payload
//	+------+--------+-----+-----+---------+----------------
//	         version type  id    length of the payload
//
// in big endian. The payload is one msgpack map in canonical form. Each set of fields therefore has one encoding, and
// everything else is refused: a frame that two readers could understand differently does not exist.
package frame

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"kalium.dev/kalium/runtime/internal/policy"
)

// Bounds of the wire. kalium/protocol has the same ones.
const (
	Version       = 1 // of the frame's form
	HeaderBytes   = 12
	FrameBytesMax = 1 << 20 // of the payload
	TextBytesMax  = 512     // of every str
	ItemsMax      = 4096    // of every array and map: the states of a function are at most so many
	StepBytes     = 16
)

// protosMax bounds the versions that a hello may list.
const protosMax = 16

// Protos are the versions of the messages that this side speaks. The highest that both speak is taken.
func Protos() []int { return []int{2} }

// Negotiated is the highest version that both sides speak; 0 when there is none.
func Negotiated(theirs []int) int {
	highest := 0
	for _, own := range Protos() {
		if own > highest && slices.Contains(theirs[:min(len(theirs), protosMax)], own) {
			highest = own
		}
	}
	return highest
}

// ErrShort means that the front of the stream is the beginning of a frame: ask again with more bytes.
var ErrShort = errors.New("frame: more bytes are needed")

// Error is the only error besides ErrShort. From a Reader it is the peer's mistake: the connection has to be closed and
// the text logged. From Append it is the caller's.
type Error struct{ Text string }

// Error implements error.
func (e *Error) Error() string { return "frame: " + e.Text }

const errorTextMax = 200

func broken(format string, args ...any) error {
	for i, arg := range args {
		// Causes are flattened: one sentence, with the prefix once.
		if cause, ok := arg.(*Error); ok {
			args[i] = cause.Text
		}
	}
	return &Error{Text: policy.Printable(fmt.Sprintf(format, args...), errorTextMax)}
}

// Append appends the frame of m to dst. id is 0 for messages without an answer and never 0 for questions and answers.
// Start, Invoke and End are written in their second shape when their Identity is set.
func Append(dst []byte, id uint32, m Message) ([]byte, error) {
	kind, known := kinds[m.Type()]
	if !known {
		return nil, broken("type %d is unknown", m.Type())
	}
	if kind.correlated != (id != 0) {
		return nil, broken("id %d of a message of type %d", id, m.Type())
	}
	if err := check(m); err != nil {
		return nil, err
	}
	fields := m.fields()
	if i, ok := m.(identified); ok && *i.identity() != (Identity{}) {
		fields = withIdentity(fields, i.identity())
	}
	begin := len(dst)
	dst = append(dst, 'K', 'L', Version, byte(m.Type()))
	dst = binary.BigEndian.AppendUint32(dst, id)
	dst = append(dst, 0, 0, 0, 0)
	dst, err := appendRecord(dst, fields)
	if err != nil {
		return nil, err
	}
	length := len(dst) - begin - HeaderBytes
	if length > FrameBytesMax {
		return nil, broken("a payload of %d bytes, at most %d", length, FrameBytesMax)
	}
	binary.BigEndian.PutUint32(dst[begin+8:], uint32(length))
	return dst, nil
}

// Decode reads the frame at the front of b; n counts its bytes. Nothing of the message refers to b.
func Decode(b []byte) (id uint32, m Message, n int, err error) {
	// Each byte of the header is refused as soon as it is there, so that another protocol is not waited for.
	for i, want := range [...]byte{'K', 'L', Version} {
		if len(b) > i && b[i] != want {
			return 0, nil, 0, broken("byte %d of a frame is %#02x, not %#02x", i, b[i], want)
		}
	}
	if len(b) < 4 {
		return 0, nil, 0, ErrShort
	}
	kind, known := kinds[Type(b[3])]
	if !known {
		return 0, nil, 0, broken("type %d is unknown", b[3])
	}
	if len(b) < HeaderBytes {
		return 0, nil, 0, ErrShort
	}
	id = binary.BigEndian.Uint32(b[4:])
	if kind.correlated != (id != 0) {
		return 0, nil, 0, broken("id %d of a message of type %d", id, b[3])
	}
	length := binary.BigEndian.Uint32(b[8:])
	if length > FrameBytesMax {
		return 0, nil, 0, broken("a payload of %d bytes, at most %d", length, FrameBytesMax)
	}
	n = HeaderBytes + int(length)
	if len(b) < n {
		return 0, nil, 0, ErrShort
	}
	m = kind.make()
	d := decoder{rest: b[HeaderBytes:n]}
	fields := m.fields()
	i, ok := m.(identified)
	// The number of entries tells which shape it is.
	whole := ok && length > 0 && int(b[HeaderBytes]) == codeFixMap+len(fields)+identityFields
	if whole {
		fields = withIdentity(fields, i.identity())
	}
	if err := d.record(fields); err != nil {
		return 0, nil, 0, broken("type %d: %v", b[3], err)
	}
	if len(d.rest) != 0 {
		return 0, nil, 0, broken("type %d: %d bytes follow the payload's map", b[3], len(d.rest))
	}
	if whole && *i.identity() == (Identity{}) {
		// Two shapes of one message would be two encodings of it.
		return 0, nil, 0, broken("type %d: an identity that is empty", b[3])
	}
	if err := check(m); err != nil {
		return 0, nil, 0, broken("type %d: %v", b[3], err)
	}
	return id, m, n, nil
}

// Reader cuts a stream into frames. Its zero value is ready. It does no I/O; at most one frame and one fed piece are
// held.
type Reader struct {
	held []byte
	err  error
}

// Feed adds bytes of the stream, in any split. Take all frames with Next before feeding more.
func (r *Reader) Feed(b []byte) {
	if r.err == nil {
		r.held = append(r.held, b...)
	}
}

// Next returns the next frame, or ErrShort when it is not whole yet, or an *Error, which is final.
func (r *Reader) Next() (id uint32, m Message, err error) {
	if r.err != nil {
		return 0, nil, r.err
	}
	id, m, n, err := Decode(r.held)
	if err != nil {
		if err != ErrShort {
			r.err, r.held = err, nil
		}
		return 0, nil, err
	}
	if n == len(r.held) {
		r.held = r.held[:0]
	} else {
		r.held = r.held[n:]
	}
	return id, m, nil
}

// Held counts the bytes of the unfinished frame: the end of a stream is clean only when it is 0.
func (r *Reader) Held() int { return len(r.held) }
