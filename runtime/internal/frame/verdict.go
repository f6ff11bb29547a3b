package frame

import (
	"encoding/binary"

	"kalium.dev/kalium/runtime/internal/policy"
)

// AppendVerdict appends the frame that Append makes of a Verdict with r. It is called for every judged message, so it
// allocates nothing when dst has room.
func AppendVerdict(dst []byte, r *VerdictRecord) ([]byte, error) {
	if r.Event != EventVerdict {
		return nil, broken("event %q of a verdict record", r.Event)
	}
	if !policy.Reason(r.Reason).Known() {
		return nil, broken("reason %q", r.Reason)
	}
	if err := failModeAllowed(r.FailMode); err != nil {
		return nil, err
	}
	begin := len(dst)
	dst = append(dst, 'K', 'L', Version, byte(TypeVerdict))
	dst = binary.BigEndian.AppendUint32(dst, 0)
	dst = append(dst, 0, 0, 0, 0)
	w := writer{dst: dst}
	w.count(1, codeFixMap, codeMap16)
	w.text("record")
	w.count(17, codeFixMap, codeMap16)
	w.flag("allowed", r.Allowed)
	w.field("call", r.Call)
	w.field("event", r.Event)
	w.text("expected")
	w.count(len(r.Expected), codeFixArray, codeArray16)
	for _, text := range r.Expected {
		w.text(text)
	}
	w.field("fail_mode", r.FailMode)
	w.field("invocation", r.Invocation)
	w.field("judging", r.Judging)
	w.field("kind", r.Kind)
	w.number("latency_us", r.LatencyUS)
	w.number("line", r.Line)
	w.field("message", r.Message)
	w.field("mode", r.Mode)
	w.field("peer", r.Peer)
	w.number("policy_version", r.PolicyVersion)
	w.field("reason", r.Reason)
	w.text("states")
	w.count(len(r.States), codeFixArray, codeArray16)
	for _, state := range r.States {
		w.dst = appendInt(w.dst, int64(state))
	}
	w.flag("would_deny", r.WouldDeny)
	if w.err != nil {
		return nil, w.err
	}
	length := len(w.dst) - begin - HeaderBytes
	if length > FrameBytesMax {
		return nil, broken("a payload of %d bytes, at most %d", length, FrameBytesMax)
	}
	binary.BigEndian.PutUint32(w.dst[begin+8:], uint32(length))
	return w.dst, nil
}

// writer appends fields until the first error.
type writer struct {
	dst []byte
	err error
}

func (w *writer) count(n int, fix, code16 byte) {
	if err := countAllowed(n); err != nil && w.err == nil {
		w.err = err
	}
	w.dst = appendCount(w.dst, n, fix, code16)
}

func (w *writer) text(text string) {
	dst, err := appendText(w.dst, text)
	if err != nil {
		if w.err == nil {
			w.err = err
		}
		return
	}
	w.dst = dst
}

func (w *writer) field(name, text string) {
	w.text(name)
	w.text(text)
}

func (w *writer) number(name string, n int) {
	w.text(name)
	w.dst = appendInt(w.dst, int64(n))
}

func (w *writer) flag(name string, set bool) {
	w.text(name)
	code := byte(codeFalse)
	if set {
		code = codeTrue
	}
	w.dst = append(w.dst, code)
}
