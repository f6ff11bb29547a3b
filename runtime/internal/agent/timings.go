package agent

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"sync"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
)

// timingLine is one line of the timing log; docs/reference/results.md says what the fields mean.
type timingLine struct {
	lineHead
	Invocation   string `json:"invocation"`
	Kind         string `json:"kind"`
	Bytes        int    `json:"bytes"`
	RecordNS     int    `json:"record_ns"`
	OpenNS       int    `json:"open_ns"`
	EventNS      int    `json:"event_ns"`
	LocalNS      int    `json:"local_ns"`
	ControllerNS int    `json:"controller_ns"`
	TotalNS      int    `json:"total_ns"`
	ResealNS     int    `json:"reseal_ns"`
}

// lossLine says that samples of an instance are missing in front of it.
type lossLine struct {
	lineHead
	Dropped int `json:"dropped"`
}

// timingLog writes what guards have measured. It is a measurement and no evidence: whatever goes wrong with it costs
// samples, which are counted, and never a verdict or a guard's time. The file is made by the first sample.
type timingLog struct {
	path     string
	node     string
	bytesMax int64
	onError  func(error) // called once for each failure
	batches  chan timingBatch
	done     chan struct{}

	mu     sync.Mutex
	lost   map[frame.Identity]int // guarded by mu; samples that found no room in batches
	closed bool                   // guarded by mu

	// Of the writing goroutine:
	file   *os.File
	size   int64
	seq    int64
	failed bool
	unsaid map[frame.Identity]int // lost samples without a line
}

// timingBatch is one frame of a guard, or the wish to open the file again.
type timingBatch struct {
	identity frame.Identity
	times    *frame.Times
	reopen   bool
}

func openTimingLog(path, node string, onError func(error)) *timingLog {
	l := &timingLog{
		path: path, node: node, bytesMax: timingsBytesMax, onError: onError,
		batches: make(chan timingBatch, timingsWaitingMax), done: make(chan struct{}),
		lost: map[frame.Identity]int{}, unsaid: map[frame.Identity]int{},
	}
	go l.write()
	return l
}

// add takes the samples of one frame without waiting.
func (l *timingLog) add(id *frame.Identity, m *frame.Times) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	select {
	case l.batches <- timingBatch{identity: *id, times: m}:
	default:
		lose(l.lost, *id, len(m.Kind)+m.Dropped)
	}
}

// lose counts n lost samples of an instance, or of nobody when the table is full.
func lose(table map[frame.Identity]int, id frame.Identity, n int) {
	if _, known := table[id]; !known && len(table) >= instancesMax {
		id = frame.Identity{}
	}
	if n > 0 {
		table[id] += n
	}
}

// reopenFile goes on in a new file at the same path. A full queue says no: the next signal asks again.
func (l *timingLog) reopenFile() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	select {
	case l.batches <- timingBatch{reopen: true}:
	default:
	}
}

// close writes what was added and ends the goroutine.
func (l *timingLog) close() {
	l.mu.Lock()
	if !l.closed {
		l.closed = true
		close(l.batches)
	}
	l.mu.Unlock()
	<-l.done
}

// write is the only goroutine that touches the file.
func (l *timingLog) write() {
	defer close(l.done)
	defer l.closeFile()
	for batch := range l.batches {
		if batch.reopen {
			l.closeFile()
		} else {
			l.take(&batch)
		}
	}
}

func (l *timingLog) take(batch *timingBatch) {
	l.mu.Lock()
	for id, n := range l.lost {
		lose(l.unsaid, id, n)
	}
	clear(l.lost)
	l.mu.Unlock()
	lose(l.unsaid, batch.identity, batch.times.Dropped)
	lines, seq := l.lines(batch)
	if err := l.append(lines); err != nil {
		lose(l.unsaid, batch.identity, len(batch.times.Kind))
		if !l.failed {
			l.onError(err)
		}
		l.failed = true
		l.closeFile() // the next batch tries it from the beginning
		return
	}
	l.failed, l.seq = false, seq
	clear(l.unsaid)
}

// lines are the losses known so far and the samples of batch; seq is the number of the last line.
func (l *timingLog) lines(batch *timingBatch) (lines []byte, seq int64) {
	seq = l.seq
	now := time.Now().UnixMilli()
	next := func(event string, id *frame.Identity) lineHead {
		seq++
		head := headOf(event, l.node, id)
		head.TimeMS, head.Seq = now, seq
		return head
	}
	var buffer bytes.Buffer
	encoder := json.NewEncoder(&buffer)
	encoder.SetEscapeHTML(false)
	for id, n := range l.unsaid {
		_ = encoder.Encode(&lossLine{lineHead: next("timings_lost", &id), Dropped: n}) // numbers and texts: nothing can fail
	}
	m := batch.times
	for i := range m.Kind {
		_ = encoder.Encode(&timingLine{
			lineHead:   next("timing", &batch.identity),
			Invocation: m.Invocation[i], Kind: m.Kind[i], Bytes: m.Bytes[i], RecordNS: m.Record[i], OpenNS: m.Open[i],
			EventNS: m.Event[i], LocalNS: m.Local[i], ControllerNS: m.Controller[i], TotalNS: m.Total[i], ResealNS: m.Reseal[i],
		})
	}
	return buffer.Bytes(), seq
}

// append writes lines whole. A file that is full is moved to its path with `.1` behind it, over the one before.
func (l *timingLog) append(lines []byte) error {
	if len(lines) == 0 {
		return nil
	}
	if l.file != nil && l.size+int64(len(lines)) > l.bytesMax {
		l.closeFile()
		if err := os.Rename(l.path, l.path+".1"); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if l.file == nil {
		file, err := os.OpenFile(l.path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o640)
		if err != nil {
			return err
		}
		l.file = file
		info, err := file.Stat()
		if err != nil {
			return err
		}
		l.size = info.Size()
	}
	if err := writeLines(l.file, lines); err != nil {
		return err
	}
	l.size += int64(len(lines))
	return nil
}

func (l *timingLog) closeFile() {
	if l.file != nil {
		_ = l.file.Close() // every write was checked; nothing is buffered behind it
		l.file = nil
	}
}
