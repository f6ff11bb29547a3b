// Package load drives controllers and agents the way agents and guards do, and measures what comes back. It is a tool of
// the benchmarks; no site installs it.
//
// A lane is one worker with at most one open question. Lanes share connections, so that many calls are under way at a
// time. Frames are written from templates and most answers are read at offsets that were learnt from the first of their
// kind, so that the generator is not what is measured.
package load

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
)

const (
	dialTimeout   = 5 * time.Second
	answerTimeout = 30 * time.Second // for the next byte of a peer that owes answers
	readBytes     = 256 << 10
)

// Target is a controller, or something that answers in its place.
type Target struct {
	Address       string
	Name          string // that its certificate has to have
	CA, Cert, Key string // PEM files; without them the connection is in clear
}

func (t Target) dial() (net.Conn, error) {
	if t.CA == "" {
		return net.DialTimeout("tcp", t.Address, dialTimeout)
	}
	authority, err := os.ReadFile(t.CA)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(authority) {
		return nil, fmt.Errorf("%s holds no certificate", t.CA)
	}
	own, err := tls.LoadX509KeyPair(t.Cert, t.Key)
	if err != nil {
		return nil, err
	}
	config := &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: roots, ServerName: t.Name, Certificates: []tls.Certificate{own}}
	return tls.DialWithDialer(&net.Dialer{Timeout: dialTimeout}, "tcp", t.Address, config)
}

// wire is one connection that frames go over.
type wire struct {
	conn   net.Conn
	in     []byte // of which the front is not read yet
	buffer []byte
	out    []byte
}

func newWire(conn net.Conn) *wire { return &wire{conn: conn, buffer: make([]byte, readBytes)} }

func (w *wire) flush() error {
	if len(w.out) == 0 {
		return nil
	}
	_, err := w.conn.Write(w.out)
	w.out = w.out[:0]
	return err
}

// read waits for bytes, for answerTimeout at most, and calls each for every whole frame that is there then.
func (w *wire) read(each func(raw []byte) error) error {
	if err := w.conn.SetReadDeadline(time.Now().Add(answerTimeout)); err != nil {
		return err
	}
	return w.readForever(each)
}

func (w *wire) readForever(each func(raw []byte) error) error {
	n, err := w.conn.Read(w.buffer)
	if err != nil {
		return err
	}
	w.in = append(w.in, w.buffer[:n]...)
	rest := w.in
	for len(rest) >= frame.HeaderBytes {
		length := frame.HeaderBytes + int(binary.BigEndian.Uint32(rest[8:]))
		if len(rest) < length {
			break
		}
		if err := each(rest[:length]); err != nil {
			return err
		}
		rest = rest[length:]
	}
	w.in = w.in[:copy(w.in, rest)]
	return nil
}

// ask sends one question and waits for its answer; other frames before it are dropped.
func (w *wire) ask(id uint32, question frame.Message) (answer frame.Message, err error) {
	if w.out, err = frame.Append(w.out, id, question); err != nil {
		return nil, err
	}
	if err := w.flush(); err != nil {
		return nil, err
	}
	for answer == nil && err == nil {
		err = w.read(func(raw []byte) error {
			got, m, _, err := frame.Decode(raw)
			if err == nil && got == id {
				answer = m
			}
			return err
		})
	}
	return answer, err
}

// template is a frame with holes of a fixed length.
type template struct {
	raw                           []byte
	step, call, invocation, token int // where the holes begin; 0 for none
}

// Stand-ins for what is not known yet. Each occurs once in a frame.
const (
	holeStep       = "00000000000000aa"
	holeCall       = "000000000000000000000000000000bb"
	holeInvocation = "000000000000000000000000000000cc"
	holeToken      = "000000000000000000000000000000dd"
)

func newTemplate(id uint32, m frame.Message) (template, error) {
	raw, err := frame.Append(nil, id, m)
	if err != nil {
		return template{}, err
	}
	at := func(hole string) int { return max(0, bytes.Index(raw, []byte(hole))) }
	return template{raw, at(holeStep), at(holeCall), at(holeInvocation), at(holeToken)}, nil
}

func (t *template) appendTo(dst []byte, id uint32, step uint64, call, invocation, token []byte) []byte {
	begin := len(dst)
	dst = append(dst, t.raw...)
	made := dst[begin:]
	if id != 0 {
		binary.BigEndian.PutUint32(made[4:], id)
	}
	if t.step > 0 {
		const digits = "0123456789abcdef"
		for i := range frame.StepBytes {
			made[t.step+i] = digits[step>>(60-4*i)&0xf]
		}
	}
	for _, hole := range [...]struct {
		at   int
		text []byte
	}{{t.call, call}, {t.invocation, invocation}, {t.token, token}} {
		if hole.at > 0 {
			copy(made[hole.at:], hole.text)
		}
	}
	return dst
}

// grant is what an answer that allows carries.
type grant struct{ call, invocation, token [32]byte }

// reader reads answers: of a length that was seen before at the offsets of then, of another one as a whole.
type reader struct{ layouts map[int]layout }

type layout struct {
	allowed                 int
	call, invocation, token int
}

var errDenied = errors.New("a step was denied")

func (r *reader) read(raw []byte, into *grant) (id uint32, err error) {
	id = binary.BigEndian.Uint32(raw[4:])
	l, known := r.layouts[len(raw)]
	if !known || raw[3] != byte(frame.TypeAnswer) || raw[l.allowed] != codeTrue {
		if l, err = r.learn(raw); err != nil {
			return id, err
		}
	}
	for _, part := range [...]struct {
		at   int
		into []byte
	}{{l.call, into.call[:]}, {l.invocation, into.invocation[:]}, {l.token, into.token[:]}} {
		if part.at > 0 {
			copy(part.into, raw[part.at:])
		}
	}
	return id, nil
}

const codeTrue = 0xc3 // of msgpack

func (r *reader) learn(raw []byte) (layout, error) {
	_, m, _, err := frame.Decode(raw)
	if err != nil {
		return layout{}, err
	}
	answer, ok := m.(*frame.Answer)
	if !ok {
		return layout{}, fmt.Errorf("a frame of type %d in place of an answer", m.Type())
	}
	if !answer.Allowed {
		return layout{}, fmt.Errorf("%w: %s: %s", errDenied, answer.Reason, answer.Detail)
	}
	at := func(text string) int {
		if len(text) != 32 {
			return 0
		}
		return max(0, bytes.Index(raw, []byte(text)))
	}
	l := layout{bytes.Index(raw, []byte("allowed")) + len("allowed"), at(answer.Call), at(answer.Invocation), at(answer.Token)}
	if r.layouts == nil {
		r.layouts = map[int]layout{}
	}
	r.layouts[len(raw)] = l
	return l, nil
}

// Spread sums measurements up, in microseconds.
type Spread struct {
	N              int
	P50, P99, P999 float64
}

func spreadOf(nanoseconds []int64) Spread {
	if len(nanoseconds) == 0 {
		return Spread{}
	}
	slices.Sort(nanoseconds)
	at := func(share float64) float64 {
		return float64(nanoseconds[min(len(nanoseconds)-1, int(share*float64(len(nanoseconds))))]) / 1e3
	}
	return Spread{len(nanoseconds), at(0.50), at(0.99), at(0.999)}
}
