package agent

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"kalium.dev/kalium/runtime/internal/frame"
)

// timesOf has n samples, whose places are told apart by their total.
func timesOf(n, dropped int) *frame.Times {
	m := &frame.Times{Dropped: dropped}
	for i := range n {
		m.Invocation, m.Kind, m.Bytes = append(m.Invocation, "i"), append(m.Kind, "https"), append(m.Bytes, 1024)
		m.Record, m.Open, m.Event, m.Local = append(m.Record, 210), append(m.Open, 1500), append(m.Event, 2600), append(m.Local, 390)
		m.Controller, m.Total, m.Reseal = append(m.Controller, -1), append(m.Total, i), append(m.Reseal, 1300)
	}
	return m
}

// timingLines reads a timing log, each line as JSON.
func timingLines(t *testing.T, path string) []map[string]any {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var lines []map[string]any
	for _, line := range bytes.Split(bytes.TrimSuffix(data, []byte("\n")), []byte("\n")) {
		var fields map[string]any
		if err := json.Unmarshal(line, &fields); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		lines = append(lines, fields)
	}
	return lines
}

func newTimingLog(t *testing.T) (*timingLog, *[]error) {
	t.Helper()
	var failures []error
	l := openTimingLog(filepath.Join(t.TempDir(), "timings.jsonl"), "n", func(err error) { failures = append(failures, err) })
	t.Cleanup(l.close)
	return l, &failures
}

func TestSamplesOfAGuardAreLogged(t *testing.T) {
	s := newSite(t)
	s.startConnected()
	g := s.guard("c1", "pay")
	g.send(0, timesOf(2, 3))
	// A question behind the samples is answered as ever.
	g.send(5, &frame.Start{Step: step, Version: 1})
	r, _ := expect[*frame.Start](s.controller)
	s.controller.send(r.conn, r.id, &frame.Answer{Allowed: true, Reason: "allowed"})
	g.answer()
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}

	lines := timingLines(t, s.config.TimingLog)
	if len(lines) != 3 || lines[0]["event"] != "timings_lost" || lines[0]["dropped"] != 3.0 || lines[0]["instance"] != "c1" {
		t.Fatalf("%v", lines)
	}
	sample := lines[2]
	for name, want := range map[string]any{
		"event": "timing", "seq": 3.0, "node": "node-0", "instance": "c1", "app": "shop", "function": "pay", "invocation": "i", "kind": "https",
		"bytes": 1024.0, "record_ns": 210.0, "open_ns": 1500.0, "event_ns": 2600.0, "local_ns": 390.0, "controller_ns": -1.0, "total_ns": 1.0,
		"reseal_ns": 1300.0,
	} {
		if sample[name] != want {
			t.Errorf("%s is %v, want %v", name, sample[name], want)
		}
	}
	if info, err := os.Stat(s.config.TimingLog); err != nil || info.Mode().Perm() != 0o640 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
}

func TestWithoutSamplesThereIsNoTimingLog(t *testing.T) {
	l, _ := newTimingLog(t)
	l.reopenFile()
	l.close()

	if _, err := os.Stat(l.path); !os.IsNotExist(err) {
		t.Errorf("it is there: %v", err)
	}
	l.add(&frame.Identity{}, timesOf(1, 0)) // too late, and no error
	l.reopenFile()
}

func TestAFullTimingLogMakesRoomForAnother(t *testing.T) {
	l, failures := newTimingLog(t)
	l.bytesMax = 4000
	for range 10 {
		l.add(&frame.Identity{Instance: "c1"}, timesOf(5, 0))
	}
	l.close()

	now, before := timingLines(t, l.path), timingLines(t, l.path+".1")
	if len(*failures) != 0 || now[len(now)-1]["seq"] != 50.0 || before[len(before)-1]["seq"].(float64)+1 != now[0]["seq"] {
		t.Errorf("%v; %d lines after %d", *failures, len(now), len(before))
	}
	for _, path := range []string{l.path, l.path + ".1"} {
		if info, err := os.Stat(path); err != nil || info.Size() > l.bytesMax {
			t.Errorf("%s: %d bytes, %v", path, info.Size(), err)
		}
	}
}

func TestATimingLogThatCannotBeWrittenCostsSamplesOnly(t *testing.T) {
	l, failures := newTimingLog(t)
	l.close() // the test writes in its place
	l.path = filepath.Join(filepath.Dir(l.path), "none", "timings.jsonl")
	defer l.closeFile()
	l.take(&timingBatch{identity: frame.Identity{Instance: "c1"}, times: timesOf(2, 0)})
	l.take(&timingBatch{identity: frame.Identity{Instance: "c1"}, times: timesOf(2, 1)})
	if err := os.Mkdir(filepath.Dir(l.path), 0o700); err != nil {
		t.Fatal(err)
	}
	l.take(&timingBatch{identity: frame.Identity{Instance: "c2"}, times: timesOf(1, 0)})

	lines := timingLines(t, l.path)
	if len(*failures) != 1 || len(lines) != 2 || lines[0]["dropped"] != 5.0 || lines[0]["instance"] != "c1" || lines[1]["seq"] != 2.0 {
		t.Errorf("%v; %v", *failures, lines)
	}
}

func TestFramesWithoutRoomAreCounted(t *testing.T) {
	l := &timingLog{batches: make(chan timingBatch, 1), lost: map[frame.Identity]int{}}
	id := frame.Identity{Instance: "c1"}
	l.add(&id, timesOf(1, 0))
	l.add(&id, timesOf(2, 4))

	if l.lost[id] != 6 {
		t.Errorf("%d", l.lost[id])
	}
	for i := range instancesMax + 5 {
		lose(l.lost, frame.Identity{Instance: string(rune('a' + i))}, 1)
	}
	if len(l.lost) > instancesMax+1 {
		t.Errorf("a table of %d", len(l.lost))
	}
}
