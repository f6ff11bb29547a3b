package frame

import (
	"bytes"
	"strings"
	"testing"
)

func verdictRecords() map[string]VerdictRecord {
	plain := VerdictRecord{
		Event: EventVerdict, Mode: "enforce", PolicyVersion: 7, Call: strings.Repeat("a", 32), Invocation: strings.Repeat("b", 32), Kind: "http",
		Message: "http GET api /a", Peer: "api", Allowed: true, Reason: "allowed", Line: 3, States: []int{1, 300, 70000}, LatencyUS: 12,
	}
	records := map[string]VerdictRecord{"plain": plain, "empty": {Event: EventVerdict, Reason: "no_guard"}}
	change := func(name string, with func(*VerdictRecord)) {
		r := plain
		with(&r)
		records[name] = r
	}
	change("a denial", func(r *VerdictRecord) {
		r.Allowed, r.WouldDeny, r.Reason, r.Expected = false, true, "out_of_order", []string{"a @line 1", strings.Repeat("x", 300)}
	})
	change("long texts", func(r *VerdictRecord) { r.Message, r.Peer = strings.Repeat("m", 300), strings.Repeat("p", 32) })
	change("many states", func(r *VerdictRecord) { r.States = make([]int, ItemsMax) })
	change("negative numbers", func(r *VerdictRecord) { r.Line, r.LatencyUS = -1, -70000 })
	change("too many states", func(r *VerdictRecord) { r.States = make([]int, ItemsMax+1) })
	change("a text too long", func(r *VerdictRecord) { r.Message = strings.Repeat("m", TextBytesMax+1) })
	change("a text that is none", func(r *VerdictRecord) { r.Peer = "\xff" })
	change("an unknown reason", func(r *VerdictRecord) { r.Reason = "because" })
	change("another event", func(r *VerdictRecord) { r.Event = "start" })
	return records
}

func TestAVerdictIsWrittenAsAnyFrame(t *testing.T) {
	refused := 0
	for name, r := range verdictRecords() {
		want, wantErr := Append([]byte("before"), 0, &Verdict{Record: r})

		got, err := AppendVerdict([]byte("before"), &r)

		if !bytes.Equal(got, want) || (err == nil) != (wantErr == nil) {
			t.Errorf("%s: %x, %v; want %x, %v", name, got, err, want, wantErr)
		}
		if err != nil {
			refused++
		}
	}
	if refused != 5 {
		t.Errorf("%d records were refused", refused)
	}
}

func TestAVerdictIsWrittenWithoutAllocations(t *testing.T) {
	r := verdictRecords()["plain"]
	room := make([]byte, 0, 1024)

	if n := testing.AllocsPerRun(100, func() {
		if _, err := AppendVerdict(room, &r); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
