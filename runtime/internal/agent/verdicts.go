package agent

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
)

// lineHead is what begins each line of a log that is written for guards. Numbers count the lines of one log.
type lineHead struct {
	Event    string `json:"event"`
	TimeMS   int64  `json:"time_ms"`
	Seq      int64  `json:"seq"`
	Node     string `json:"node"`
	Instance string `json:"instance"`
	App      string `json:"app"`
	Function string `json:"function"`
}

func headOf(event, node string, id *frame.Identity) lineHead {
	return lineHead{Event: event, Node: node, Instance: id.Instance, App: id.App, Function: id.Function}
}

// verdictLine is one line of the verdict log; docs/reference/policy.md says what the fields mean.
type verdictLine struct {
	lineHead
	ID string `json:"id"`
	verdictFields
}

// suppressedLine says how many verdicts of an instance were beyond the bound on denials, by reason.
type suppressedLine struct {
	lineHead
	Counts map[string]int `json:"counts"`
}

// verdictFields are what a verdict says in the verdict log and in the audit log.
type verdictFields struct {
	Mode          string   `json:"mode"`
	PolicyVersion int      `json:"policy_version"`
	Call          string   `json:"call"`
	Invocation    string   `json:"invocation"`
	Kind          string   `json:"kind"`
	Message       string   `json:"message"`
	Peer          string   `json:"peer"`
	Allowed       bool     `json:"allowed"`
	WouldDeny     bool     `json:"would_deny"`
	Reason        string   `json:"reason"`
	Expected      []string `json:"expected"`
	Line          int      `json:"line"`
	States        []int    `json:"states"`
	Judging       string   `json:"judging"`
	LatencyUS     int      `json:"latency_us"`
	FailMode      string   `json:"fail_mode"`
}

func fieldsOf(r *frame.VerdictRecord) verdictFields {
	return verdictFields{
		Mode: r.Mode, PolicyVersion: r.PolicyVersion, Call: r.Call, Invocation: r.Invocation, Kind: r.Kind, Message: r.Message, Peer: r.Peer,
		Allowed: r.Allowed, WouldDeny: r.WouldDeny, Reason: r.Reason, Expected: r.Expected, Line: r.Line, States: r.States,
		Judging: r.Judging, LatencyUS: r.LatencyUS, FailMode: r.FailMode,
	}
}

var errLogFailed = errors.New("the verdict log cannot be written")

// verdictLog writes lines in the order in which they were added, many with one write(2). Only whole lines reach the
// file. While it cannot be written it has failed: nothing more is taken, what was taken is kept and tried again.
type verdictLog struct {
	path    string
	node    string
	run     string // of this start of the agent; its first half begins the ids of verdicts
	now     func() time.Time
	wait    time.Duration // of a guard whose verdict does not fit
	onError func(error)   // called once for each failure, without locks
	onWell  func()        // the file can be written again

	mu      sync.Mutex
	room    *sync.Cond // signalled when pending shrinks or the state changes
	pending []byte     // guarded by mu; whole lines
	spare   []byte     // guarded by mu; the buffer of the last batch
	seq     int64      // guarded by mu
	failed  bool       // guarded by mu
	closed  bool       // guarded by mu

	first  chan struct{} // the batch has its first line
	urgent chan struct{} // the batch is full, or close was called
	reopen chan chan error
	done   chan struct{}

	file *os.File // of the writing goroutine
}

// openVerdictLog opens the file and starts the goroutine that writes it.
func openVerdictLog(path, node, run string, onError func(error), onWell func()) (*verdictLog, error) {
	l := &verdictLog{
		path: path, node: node, run: run, now: time.Now, wait: verdictWaitMax, onError: onError, onWell: onWell,
		first: make(chan struct{}, 1), urgent: make(chan struct{}, 1), reopen: make(chan chan error), done: make(chan struct{}),
	}
	l.room = sync.NewCond(&l.mu)
	file, err := openLog(path)
	if err != nil {
		return nil, environment("agent.verdict_log", "cannot open the verdict log "+path,
			"create its folder, or correct verdict_log in the configuration", "%v", err)
	}
	l.file = file
	go l.write()
	return l, nil
}

func openLog(path string) (*os.File, error) {
	// Programs of the experiments read it as whoever runs them; it holds no payload.
	return os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o644)
}

// add appends one line and returns the verdict's id: half of the agent's run and the line's number. After nil the line will
// be written, or the log fails and onError is called. It waits for a bounded time when the batch is full.
func (l *verdictLog) add(id *frame.Identity, r *frame.VerdictRecord) (verdict string, err error) {
	line := verdictLine{lineHead: headOf(r.Event, l.node, id), verdictFields: fieldsOf(r)}
	err = l.append(&line.lineHead, func() any {
		line.ID = fmt.Sprintf("%.8s%08x", l.run, uint32(line.Seq))
		return &line
	})
	return line.ID, err
}

// addSuppressed appends one line about verdicts that have none.
func (l *verdictLog) addSuppressed(id *frame.Identity, counts map[string]int) error {
	line := suppressedLine{lineHead: headOf("suppressed", l.node, id), Counts: counts}
	return l.append(&line.lineHead, func() any { return &line })
}

// append gives head its time and number, and appends the line that is made then.
func (l *verdictLog) append(head *lineHead, line func() any) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.waitForRoom(); err != nil {
		return err
	}
	head.TimeMS, head.Seq = l.now().UnixMilli(), l.seq+1
	buffer := bytes.NewBuffer(l.pending)
	encoder := json.NewEncoder(buffer)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(line()); err != nil { // ends the line itself
		return fmt.Errorf("encode a verdict: %w", err)
	}
	was := len(l.pending)
	l.pending, l.seq = buffer.Bytes(), head.Seq
	if was == 0 {
		signal(l.first)
	}
	if len(l.pending) >= verdictBatchBytes {
		signal(l.urgent)
	}
	return nil
}

// waitForRoom needs mu.
func (l *verdictLog) waitForRoom() error {
	if len(l.pending) >= verdictPendingMax && !l.failed && !l.closed {
		deadline := time.Now().Add(l.wait)
		timer := time.AfterFunc(l.wait, l.room.Broadcast)
		defer timer.Stop()
		for len(l.pending) >= verdictPendingMax && !l.failed && !l.closed && time.Now().Before(deadline) {
			l.room.Wait()
		}
	}
	if l.failed || l.closed || len(l.pending) >= verdictPendingMax {
		return errLogFailed
	}
	return nil
}

// healthy tells whether lines are taken.
func (l *verdictLog) healthy() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return !l.failed && !l.closed
}

// reopenFile writes what was added so far and goes on in a new file at the same path: the old one was moved away. On
// an error the old file stays in use.
func (l *verdictLog) reopenFile() error {
	answer := make(chan error, 1)
	select {
	case l.reopen <- answer:
		return <-answer
	case <-l.done:
		return errLogFailed
	}
}

// close writes what was added and ends the goroutine.
func (l *verdictLog) close() error {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	signal(l.urgent)
	<-l.done
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.pending) > 0 {
		return fmt.Errorf("%w: %d bytes of verdicts are lost", errLogFailed, len(l.pending))
	}
	return nil
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// write is the only goroutine that touches the file.
func (l *verdictLog) write() {
	defer close(l.done)
	defer func() { _ = l.file.Close() }() // every write was checked; nothing is buffered behind it
	var due <-chan time.Time
	for {
		select {
		case <-l.first:
			if due == nil {
				due = time.After(verdictDelay)
			}
			continue
		case answer := <-l.reopen:
			l.flush()
			answer <- l.replaceFile()
		case <-l.urgent:
		case <-due:
		}
		due = nil
		if !l.flush() {
			due = time.After(verdictRetry)
		}
		l.mu.Lock()
		ended := l.closed
		l.mu.Unlock()
		if ended {
			l.flush() // a line may have come between the last flush and the end
			return
		}
	}
}

func (l *verdictLog) replaceFile() error {
	file, err := openLog(l.path)
	if err != nil {
		return fmt.Errorf("open the verdict log again: %w", err)
	}
	old := l.file
	l.file = file
	return old.Close()
}

// flush writes the batch and tells whether it did.
func (l *verdictLog) flush() bool {
	l.mu.Lock()
	batch := l.pending
	l.pending, l.spare = l.spare[:0], nil
	l.mu.Unlock()
	err := writeLines(l.file, batch)
	l.mu.Lock()
	failedBefore := l.failed
	l.failed = err != nil
	if err != nil {
		l.pending = append(batch, l.pending...)
	} else {
		l.spare = batch[:0]
	}
	l.room.Broadcast()
	l.mu.Unlock()
	switch {
	case err != nil && !failedBefore:
		l.onError(err)
	case err == nil && failedBefore:
		l.onWell()
	}
	return err == nil
}

type logFile interface {
	io.Writer
	Stat() (os.FileInfo, error)
	Truncate(size int64) error
}

// writeLines writes the batch with one write(2). A write that took only a part is taken back, so that no reader ever
// sees half a line followed by something else.
func writeLines(file logFile, batch []byte) error {
	if len(batch) == 0 {
		return nil
	}
	n, err := file.Write(batch)
	if err == nil {
		return nil
	}
	if n == 0 {
		return err
	}
	info, statErr := file.Stat()
	if statErr != nil {
		return errors.Join(err, statErr)
	}
	return errors.Join(err, file.Truncate(info.Size()-int64(n)))
}
