package audit

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// patience bounds every wait of these tests. A test that passes never needs it.
const patience = 10 * time.Second

type text struct {
	ID   string `json:"id"`
	Text string `json:"text"`
}

// watched is a log whose failures and recoveries are counted.
type watched struct {
	*Log
	path         string
	failed, well atomic.Int32
	lost         atomic.Int32
}

func watch(t *testing.T, o Options) *watched {
	t.Helper()
	w := &watched{path: o.Path}
	o.Key, o.Writer, o.Name, o.Run = testKey(), "agent", "node0", "00f1e2d3c4b5a697"
	if o.Fsync == "" {
		o.Fsync = FsyncInterval
	}
	if o.BytesMax == 0 {
		o.BytesMax = 1 << 30
	}
	o.OnFailed = func(error) { w.failed.Add(1) }
	o.OnWell = func(lost int) { w.well.Add(1); w.lost.Add(int32(lost)) }
	l, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	w.Log = l
	return w
}

func until(t *testing.T, what string, holds func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !holds() {
		if time.Now().After(deadline) {
			t.Fatalf("it does not come about that %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// linesOf checks the chain of one file and returns its entries.
func linesOf(t *testing.T, path string) []string {
	t.Helper()
	var all []string
	prev := start
	for raw := range bytes.Lines(must(os.ReadFile(path))) {
		l, s, err := readLine(raw)
		if err != nil || l.prev != prev || s.Seq != int64(len(all)+1) {
			t.Fatalf("line %d: %v: %q", len(all)+1, err, raw)
		}
		checkHead(t, &l, s)
		prev = l.hash
		all = append(all, string(l.entry))
	}
	return all
}

func TestManyGoroutinesMakeOneChain(t *testing.T) {
	w := watch(t, Options{Path: filepath.Join(t.TempDir(), "audit.jsonl")})
	var wait sync.WaitGroup
	for g := range 8 {
		wait.Go(func() {
			for i := range 500 {
				if err := w.Add(EventVerdict, text{ID: fmt.Sprint(g, "-", i)}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wait.Wait()

	if err := w.Close(); err != nil {
		t.Fatal(err)
	}

	all := linesOf(t, w.path)
	next := map[string]int{}
	verdicts := 0
	for _, entry := range all {
		if id, ok := strings.CutPrefix(entry[strings.Index(entry, `"event"`):], `"event":"verdict","id":"`); ok {
			verdicts++
			g, rest, _ := strings.Cut(id, "-")
			if want := fmt.Sprint(next[g], `","text":""}`); rest != want {
				t.Fatalf("%s of %s, not %s", rest, g, want)
			}
			next[g]++
		}
	}
	if verdicts != 4000 || !strings.Contains(all[len(all)-1], `"event":"head"`) || w.Durable().Seq != int64(len(all)) {
		t.Errorf("%d verdicts, the last entry is %s, durable %v", verdicts, all[len(all)-1], w.Durable())
	}
	if err := w.Add(EventVerdict, text{}); !errors.Is(err, ErrFull) {
		t.Errorf("an entry after the end: %v", err)
	}
}

func TestAHeadFollowsWithoutFurtherEntries(t *testing.T) {
	began := time.Now()
	w := watch(t, Options{Path: filepath.Join(t.TempDir(), "audit.jsonl")})

	until(t, "there is a head", func() bool {
		return bytes.Contains(must(os.ReadFile(w.path)), []byte(`"event":"head"`))
	})

	if took := time.Since(began); took < 900*time.Millisecond {
		t.Errorf("after %v", took)
	}
	until(t, "it is durable", func() bool { return w.Durable().Seq == 2 })
	if err := w.Close(); err != nil {
		t.Error(err)
	}
}

func TestTextIsKeptAsItIs(t *testing.T) {
	w := watch(t, Options{Path: filepath.Join(t.TempDir(), "audit.jsonl")})
	if err := w.Add(EventVerdict, text{Text: "<a>&\n\x00é\u2028"}); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}

	if all := linesOf(t, w.path); !strings.HasSuffix(all[1], `"text":"<a>&\n\u0000é\u2028"}`) {
		t.Errorf("%s", all[1])
	}
}

// fullDisk is a real disk without room while full is set.
type fullDisk struct {
	realDisk
	full  atomic.Bool
	tries atomic.Int32 // writes that found no room
}

type fullFile struct {
	file
	disk *fullDisk
}

func (d *fullDisk) open(path string) (file, error) {
	f, err := d.realDisk.open(path)
	return &fullFile{f, d}, err
}

func (f *fullFile) Write(b []byte) (int, error) {
	if f.disk.full.Load() {
		f.disk.tries.Add(1)
		n, _ := f.file.Write(b[:len(b)/3])
		return n, unix.ENOSPC
	}
	return f.file.Write(b)
}

func TestAFullDiskIsSaidOnceAndHeals(t *testing.T) {
	d := &fullDisk{}
	w := watch(t, Options{Path: filepath.Join(t.TempDir(), "audit.jsonl"), disk: d})
	w.wait = 10 * time.Millisecond
	until(t, "the first entry is written", func() bool { return len(must(os.ReadFile(w.path))) > 0 })
	d.full.Store(true)
	if err := w.Add(EventVerdict, text{ID: "kept"}); err != nil {
		t.Fatal(err)
	}
	until(t, "the log has failed", func() bool { return !w.Healthy() })
	// It goes on to take entries while there is room, and then counts those that it could not take.
	taken := 0
	long := text{ID: "later", Text: strings.Repeat("x", 10_000)}
	for ; w.Add(EventVerdict, long) == nil; taken++ {
		if taken > pendingBytesMax {
			t.Fatal("there is no bound")
		}
	}
	for range 4 {
		if err := w.Add(EventVerdict, long); !errors.Is(err, ErrFull) {
			t.Errorf("%v", err)
		}
	}
	if tries := d.tries.Load(); tries > 3 {
		t.Errorf("the disk was asked %d times within a moment", tries)
	}

	d.full.Store(false)

	until(t, "the log is well", w.Healthy)
	until(t, "that is said", func() bool { return w.well.Load() == 1 })
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	all := linesOf(t, w.path)
	kept, later := 0, 0
	for _, entry := range all {
		kept += strings.Count(entry, `"id":"kept"`)
		later += strings.Count(entry, `"id":"later"`)
	}
	if kept != 1 || later != taken || taken < 50 || w.failed.Load() != 1 || w.lost.Load() != 5 {
		t.Errorf("%d kept, %d of %d later ones, failed %d times, lost %d", kept, later, taken, w.failed.Load(), w.lost.Load())
	}
}

// A disk that is slow fails at nothing: no failure would say it.
func TestWhatFoundNoRoomIsSaidWithoutAFailure(t *testing.T) {
	w := watch(t, Options{Path: filepath.Join(t.TempDir(), "audit.jsonl")})
	defer w.Close()
	w.mu.Lock()
	w.taken, w.wait = pendingBytesMax, 0 // as if a batch were being written
	w.mu.Unlock()
	if err := w.Add(EventVerdict, text{}); !errors.Is(err, ErrFull) {
		t.Fatal(err)
	}
	w.mu.Lock()
	w.taken = 0
	w.mu.Unlock()

	if err := w.Add(EventVerdict, text{}); err != nil {
		t.Fatal(err)
	}

	until(t, "the loss is said", func() bool { return w.lost.Load() == 1 })
	if w.well.Load() != 1 || w.failed.Load() != 0 {
		t.Errorf("well %d times, failed %d times", w.well.Load(), w.failed.Load())
	}
}

func TestAFileSystemThatIsReallyFullLosesNothing(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Skipf("a small file system needs root: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	w := watch(t, Options{Path: filepath.Join(dir, "audit.jsonl"), Fsync: FsyncAlways})
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 32*1024), 0o600); err != nil {
		t.Fatal(err)
	}
	entries := 0
	for ; w.Healthy(); entries++ {
		if err := w.Add(EventVerdict, text{ID: fmt.Sprint(entries), Text: strings.Repeat("x", 500)}); err != nil {
			t.Fatal(err)
		}
	}

	if err := errors.Join(os.Remove(ballast), unix.Mount("none", dir, "tmpfs", unix.MS_REMOUNT, "size=8m")); err != nil {
		t.Fatal(err)
	}

	until(t, "the log is well", w.Healthy)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if all := linesOf(t, w.path); len(all) < entries+2 || w.failed.Load() != 1 {
		t.Errorf("%d lines of %d entries, failed %d times", len(all), entries, w.failed.Load())
	}
}

func TestALogThatCannotBeWrittenFromTheStartIsNotHealthy(t *testing.T) {
	d := &fullDisk{}
	d.full.Store(true)
	w := watch(t, Options{Path: filepath.Join(t.TempDir(), "audit.jsonl"), disk: d})

	if w.Healthy() || w.failed.Load() != 1 {
		t.Errorf("healthy %v, failed %d times", w.Healthy(), w.failed.Load())
	}
	if err := w.Close(); err == nil {
		t.Error("the end says nothing of lost entries")
	}
}

func TestTheKeyIsReadStrictly(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key")
	for _, text := range []string{"", "x", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadKey(path); err == nil {
			t.Errorf("%q is a key", text)
		}
	}
}

// With the encoding and the lock, as a guard's goroutine pays it.
func BenchmarkAdd(b *testing.B) {
	l, err := Open(Options{
		Path: filepath.Join(b.TempDir(), "audit.jsonl"), Key: testKey(), Writer: "agent", Name: "n", Run: "00f1e2d3c4b5a697",
		Fsync: FsyncInterval, BytesMax: 64 << 20, OnFailed: func(err error) { b.Error(err) }, OnWell: func(int) {},
	})
	if err != nil {
		b.Fatal(err)
	}
	entry := text{ID: "00f1e2d300000001", Text: strings.Repeat("x", 400)}
	for b.Loop() {
		if err := l.Add(EventVerdict, entry); err != nil {
			b.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		b.Fatal(err)
	}
}
