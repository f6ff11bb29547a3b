package audit

import (
	"bytes"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"
)

const (
	batchDelay      = 20 * time.Millisecond // from the first entry of a batch to its write
	batchBytes      = 64 * 1024             // a batch of so many bytes is written at once
	pendingBytesMax = 1 << 20               // of entries in no file; beyond it Add waits, and then refuses
	roomWaitMax     = 5 * time.Second
)

// ErrFull says that an entry was not taken: the log cannot be written, and has no room for more.
var ErrFull = errors.New("the audit log has no room for an entry")

// Options of a log.
type Options struct {
	Path     string
	Key      ed25519.PrivateKey
	Writer   string // agent or controller
	Name     string
	Run      string // 16 hexadecimal digits
	Fsync    string // FsyncAlways, FsyncInterval or FsyncNever
	BytesMax int64  // of a file
	// OnFailed and OnWell are called without locks, once for each change; OnWell is told how many entries were lost, and is called
	// without a failure, too, when a slow disk left no room for some.
	OnFailed func(error)
	OnWell   func(lost int)

	disk disk             // nil: the real one
	now  func() time.Time // nil: the system's clock
}

// Log takes entries from any goroutine and writes them in batches.
type Log struct {
	onFailed func(error)
	onWell   func(int)
	now      func() time.Time
	wait     time.Duration

	mu      sync.Mutex
	room    *sync.Cond
	journal *journal // its chain is guarded by mu, the rest belongs to the writing goroutine
	taken   int      // guarded by mu; bytes that have left the chain and are in no file
	lost    int      // guarded by mu
	failed  bool     // guarded by mu
	closed  bool     // guarded by mu
	durable Place    // guarded by mu

	first  chan struct{}
	urgent chan struct{}
	done   chan struct{}
}

// Open finds the chain at the path, or begins one, and starts the goroutine that writes it. An error says that the chain
// cannot be continued. A disk that cannot be written is none: then the log is not healthy from the start.
func Open(o Options) (*Log, error) {
	if o.disk == nil {
		o.disk = realDisk{}
	}
	if o.now == nil {
		o.now = time.Now
	}
	who := Writer{Writer: o.Writer, Name: o.Name, Run: o.Run}
	j, err := openJournal(o.disk, o.Path, o.Fsync, who, o.Key, o.BytesMax, o.now().UnixMilli())
	if err != nil {
		return nil, err
	}
	l := &Log{
		onFailed: o.OnFailed, onWell: o.OnWell, now: o.now, wait: roomWaitMax, journal: j,
		first: make(chan struct{}, 1), urgent: make(chan struct{}, 1), done: make(chan struct{}),
	}
	l.room = sync.NewCond(&l.mu)
	l.flush(false)
	go l.run()
	return l, nil
}

// Add takes one entry; fields is a struct whose JSON has no seq, time_ms and event. It waits for a bounded time when there
// is no room. After nil the entry will be written, or the log fails and OnFailed is called.
func (l *Log) Add(event string, fields any) error {
	// Outside the lock, which all guards share.
	var buffer bytes.Buffer
	encoder := json.NewEncoder(&buffer)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(fields); err != nil {
		return fmt.Errorf("encode an audit entry: %w", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.waitForRoom() {
		l.lost++
		return ErrFull
	}
	was := l.journal.chain.Waiting()
	if err := l.journal.chain.Append(event, bytes.TrimSuffix(buffer.Bytes(), []byte("\n")), l.now().UnixMilli()); err != nil {
		return err
	}
	if was == 0 {
		signal(l.first)
	}
	if l.journal.chain.Waiting() >= batchBytes {
		signal(l.urgent)
	}
	return nil
}

// waitForRoom needs mu.
func (l *Log) waitForRoom() bool {
	full := func() bool { return l.journal.chain.Waiting()+l.taken >= pendingBytesMax }
	if full() && !l.failed && !l.closed {
		deadline := time.Now().Add(l.wait)
		timer := time.AfterFunc(l.wait, l.room.Broadcast)
		defer timer.Stop()
		for full() && !l.failed && !l.closed && time.Now().Before(deadline) {
			l.room.Wait()
		}
	}
	return !l.closed && !full()
}

// Healthy tells whether the last write, and the last sync, have succeeded.
func (l *Log) Healthy() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return !l.failed && !l.closed
}

// Durable is the last entry that is in the file for good, as far as the policy of fsync goes.
func (l *Log) Durable() Place {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.durable
}

// Close writes what was taken, and a head, and ends the goroutine.
func (l *Log) Close() error {
	l.mu.Lock()
	l.closed = true
	l.room.Broadcast()
	l.mu.Unlock()
	signal(l.urgent)
	<-l.done
	l.mu.Lock()
	defer l.mu.Unlock()
	err := l.journal.file.Close()
	if n := l.journal.unwritten(); n > 0 {
		return errors.Join(fmt.Errorf("the audit log cannot be written: %d bytes of entries are lost", n), err)
	}
	return err
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// run is the only goroutine that touches the files.
func (l *Log) run() {
	defer close(l.done)
	var batch <-chan time.Time
	for {
		l.mu.Lock()
		due, failed, closed := l.journal.due(l.now().UnixMilli()), l.failed, l.closed
		l.mu.Unlock()
		if closed {
			l.flush(true)
			return
		}
		var timer <-chan time.Time
		if due >= 0 {
			timer = time.After(time.Duration(due) * time.Millisecond)
		}
		first, urgent := l.first, l.urgent
		if failed {
			first = nil // a disk that fails is not asked again for every entry
		}
		select {
		case <-first:
			if batch == nil {
				batch = time.After(batchDelay)
			}
			continue
		case <-urgent:
			if failed && !l.isClosed() {
				continue
			}
		case <-batch:
		case <-timer:
		}
		batch = nil
		l.flush(false)
	}
}

func (l *Log) isClosed() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.closed
}

// flush writes what there is.
func (l *Log) flush(isLast bool) {
	now := l.now().UnixMilli()
	moved, err := l.journal.isMoved()
	var place Place
	if err == nil {
		l.mu.Lock()
		place = l.journal.begin(now, isLast, moved)
		l.taken = l.journal.unwritten()
		l.mu.Unlock()
	}
	if err == nil {
		err = l.journal.end(place, now, isLast)
	} else {
		l.journal.fail(now)
	}
	l.mu.Lock()
	failedBefore, lost := l.failed, l.lost
	l.failed = err != nil
	if err == nil {
		l.lost = 0
	}
	l.taken = l.journal.unwritten()
	l.durable = l.journal.durable
	l.room.Broadcast()
	l.mu.Unlock()
	switch {
	case err != nil && !failedBefore:
		l.onFailed(err)
	case err == nil && (failedBefore || lost > 0):
		l.onWell(lost)
	}
}

// LoadKey reads the PEM of a writer's Ed25519 private key.
func LoadKey(path string) (ed25519.PrivateKey, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, rest := pem.Decode(data)
	if block == nil || block.Type != "PRIVATE KEY" || len(bytes.TrimSpace(rest)) != 0 {
		return nil, errors.New("the file is not exactly one PEM block PRIVATE KEY")
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	key, ok := parsed.(ed25519.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("the key is a %T, not an Ed25519 key", parsed)
	}
	return key, nil
}
