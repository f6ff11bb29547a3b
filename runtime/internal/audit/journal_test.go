package audit

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// testDisk is a file system in memory on which everything may fail. A power cut takes what was not synced, of names as of
// bytes; and a sync that has failed leaves nothing to sync behind, as Linux does.
type testDisk struct {
	names, durable map[string]*testFile
	fail           func(operation string) error // nil: nothing fails
}

type testFile struct {
	disk   *testDisk
	data   []byte
	onDisk []byte // survives a power cut
	dirty  []byte // what the next sync would bring there
}

func newTestDisk() *testDisk {
	return &testDisk{names: map[string]*testFile{}, durable: map[string]*testFile{}}
}

var errDisk = errors.New("no space left on device")

func (d *testDisk) may(operation string) error {
	if d.fail == nil {
		return nil
	}
	return d.fail(operation)
}

func (d *testDisk) open(path string) (file, error) {
	if err := d.may("open"); err != nil {
		return nil, err
	}
	if d.names[path] == nil {
		d.names[path] = &testFile{disk: d}
	}
	return d.names[path], nil
}

func (d *testDisk) rename(path, target string) error {
	if err := d.may("rename"); err != nil {
		return err
	}
	if d.names[target] != nil {
		return fs.ErrExist
	}
	d.names[target] = d.names[path]
	delete(d.names, path)
	return nil
}

func (d *testDisk) syncFolder(string) error {
	if err := d.may("sync"); err != nil {
		return err
	}
	d.durable = maps.Clone(d.names)
	return nil
}

func (d *testDisk) newestRotated(path string) (string, error) {
	newest := ""
	for name := range d.names {
		if name != path && name > newest {
			newest = name
		}
	}
	return newest, nil
}

func (d *testDisk) ends(path string) (found, error) {
	f := d.names[path]
	return readEnds(f, int64(len(f.data)))
}

func (d *testDisk) powerCut(r *rand.Rand) {
	d.names = maps.Clone(d.durable)
	for _, f := range d.names {
		rest := []byte{}
		if len(f.data) > len(f.onDisk) {
			rest = f.data[len(f.onDisk):]
		}
		// Some of what was not synced may have got there by itself.
		f.data = append(slices.Clone(f.onDisk), rest[:r.IntN(len(rest)+1)]...)
		f.onDisk, f.dirty = slices.Clone(f.data), nil
	}
}

// forgetFailedSyncs lets the next sync bring everything to the disk: a writer that is killed behind a failed sync does not
// know what it would have to write again.
func (d *testDisk) forgetFailedSyncs() {
	for _, f := range d.names {
		f.dirty = slices.Clone(f.data[len(f.onDisk):])
	}
}

func (f *testFile) ReadAt(b []byte, offset int64) (int, error) {
	return bytes.NewReader(f.data).ReadAt(b, offset)
}

func (f *testFile) Write(b []byte) (int, error) {
	n := len(b)
	err := f.disk.may("write")
	if err != nil {
		n /= 2
	}
	f.data, f.dirty = append(f.data, b[:n]...), append(f.dirty, b[:n]...)
	return n, err
}

func (f *testFile) Close() error { return nil }

func (f *testFile) size() (int64, error) { return int64(len(f.data)), nil }

func (f *testFile) truncate(size int64) error {
	if err := f.disk.may("truncate"); err != nil {
		return err
	}
	cut := len(f.data) - int(size)
	f.data = f.data[:size]
	f.dirty = f.dirty[:max(0, len(f.dirty)-cut)]
	f.onDisk = f.onDisk[:min(len(f.onDisk), int(size))]
	return nil
}

func (f *testFile) sync() error {
	err := f.disk.may("sync")
	if err == nil && len(f.onDisk)+len(f.dirty) == len(f.data) {
		f.onDisk = slices.Clone(f.data)
	}
	f.dirty = nil // also after a failure, with which they are lost
	return err
}

func (f *testFile) isAt(path string) (bool, error) { return f.disk.names[path] == f, nil }

// log is all lines of the disk's files, oldest first. It fails when they are no chain.
func (d *testDisk) log(t *testing.T, path string) []Place {
	t.Helper()
	var files []string
	for name := range d.names {
		if name != path {
			files = append(files, name)
		}
	}
	slices.Sort(files)
	if d.names[path] != nil {
		files = append(files, path)
	}
	var all []Place
	last := Place{Hash: start}
	for _, name := range files {
		for i, raw := range slices.Collect(bytes.Lines(d.names[name].data)) {
			l, s, err := readLine(raw)
			if err != nil || l.prev != last.Hash || s.Seq != last.Seq+1 {
				t.Fatalf("%s line %d: %v, %d behind %d: %q", name, i+1, err, s.Seq, last.Seq, raw)
			}
			if i == 0 && (s.Event != eventOpen || name != path && name != path+suffix(s.Seq)) {
				t.Fatalf("%s begins with %s %d", name, s.Event, s.Seq)
			}
			checkHead(t, &l, s)
			last = Place{s.Seq, l.hash}
			all = append(all, last)
		}
	}
	return all
}

func checkHead(t *testing.T, l *line, s said) {
	t.Helper()
	if s.Event != eventHead {
		return
	}
	var head struct {
		TimeMS    int64 `json:"time_ms"`
		Signature string
	}
	if err := json.Unmarshal(l.entry, &head); err != nil {
		t.Fatal(err)
	}
	signed := fmt.Appendf(nil, "%s\n%s\n%d\n%d", Format, l.prev, s.Seq, head.TimeMS)
	if !ed25519.Verify(testKey().Public().(ed25519.PublicKey), signed, must(base64.StdEncoding.DecodeString(head.Signature))) {
		t.Fatalf("head %d", s.Seq)
	}
}

// run is one start of a writer on a test's disk.
type run struct {
	*journal
	now int64
}

const testPath = "/log/audit.jsonl"

func startOn(t *testing.T, d *testDisk, fsync string, bytesMax, now int64) *run {
	t.Helper()
	j, err := openJournal(d, testPath, fsync, Writer{Writer: "agent", Name: "node0", Run: "00f1e2d3c4b5a697"}, testKey(), bytesMax, now)
	if err != nil {
		t.Fatal(err)
	}
	return &run{journal: j, now: now}
}

func (r *run) add(n int) {
	for range n {
		if err := r.chain.Append(EventVerdict, []byte(`{"id":"00f1e2d300000001"}`), r.now); err != nil {
			panic(err)
		}
	}
}

func (r *run) flush(isLast bool) error {
	moved, err := r.isMoved()
	if err != nil {
		return err
	}
	return r.end(r.begin(r.now, isLast, moved), r.now, isLast)
}

// Whatever fails and whenever it ends: what is there is one chain, and what was durable is in it.
func TestNoDurableEntryIsLostAndTheChainHolds(t *testing.T) {
	operations := []string{"write", "truncate", "sync", "rename", "open"}
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 6))
		fsync := []string{FsyncAlways, FsyncInterval, FsyncNever}[seed%3]
		d := newTestDisk()
		now := int64(1_790_000_000_000)
		w := startOn(t, d, fsync, 3000, now)
		durable := map[Place]bool{}
		keep := func() {
			if w.durable.Seq > 0 {
				durable[w.durable] = true
			}
		}
		for range 40 {
			w.now += r.Int64N(700)
			switch r.IntN(10) {
			case 0, 1, 2, 3:
				w.add(r.IntN(8))
			case 4, 5:
				_ = w.flush(false)
			case 6:
				broken := operations[r.IntN(len(operations))]
				d.fail = func(operation string) error {
					if operation == broken {
						return errDisk
					}
					return nil
				}
			case 7:
				d.fail = nil
			case 8: // kill -9
				keep()
				d.fail = nil
				d.forgetFailedSyncs()
				w = startOn(t, d, fsync, 3000, w.now)
			case 9:
				keep()
				if fsync == FsyncNever {
					continue // a power cut takes what it likes, which is what never means
				}
				d.fail = nil
				d.powerCut(r)
				w = startOn(t, d, fsync, 3000, w.now)
			}
			keep()
		}
		d.fail = nil
		if err := w.flush(true); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		keep()
		all := d.log(t, testPath)
		if t.Failed() || len(all) == 0 || all[len(all)-1] != w.chain.Place || w.durable != w.chain.Place || w.chain.hasUnsigned {
			t.Fatalf("seed %d: %d lines, the chain is at %v", seed, len(all), w.chain.Place)
		}
		for place := range durable {
			if place.Seq > int64(len(all)) || all[place.Seq-1] != place {
				t.Fatalf("seed %d, %s: entry %d was durable and is lost", seed, fsync, place.Seq)
			}
		}
	}
}

func TestWhatIsSyncedWhen(t *testing.T) {
	for _, c := range []struct {
		fsync               string
		atOnce, late, atEnd bool
	}{{FsyncAlways, true, true, true}, {FsyncInterval, false, true, true}, {FsyncNever, false, false, false}} {
		d := newTestDisk()
		syncs := 0
		d.fail = func(operation string) error {
			if operation == "sync" {
				syncs++
			}
			return nil
		}
		w := startOn(t, d, c.fsync, 1<<20, 0)
		happened := func(isLast bool) bool {
			before := syncs
			if err := w.flush(isLast); err != nil {
				t.Fatal(err)
			}
			return syncs > before
		}

		atOnce := happened(false)
		w.now = 999
		w.add(1)
		if c.fsync == FsyncInterval && (happened(false) || w.due(w.now) != 1) {
			t.Errorf("%s: synced early, or due in %d ms", c.fsync, w.due(w.now))
		}
		w.now = 1000
		w.add(1)
		late := happened(false)
		w.add(1)
		atEnd := happened(true)

		if atOnce != c.atOnce || late != c.late || atEnd != c.atEnd {
			t.Errorf("%s: at once %v, after a second %v, at the end %v", c.fsync, atOnce, late, atEnd)
		}
	}
}

func TestManyBytesAreSyncedEarlier(t *testing.T) {
	d := newTestDisk()
	w := startOn(t, d, FsyncInterval, 1<<30, 0)
	for w.size < unsyncedBytesMax {
		w.add(1000)
		if err := w.flush(false); err != nil {
			t.Fatal(err)
		}
	}

	if len(w.unsynced) != 0 || w.synced != w.size {
		t.Errorf("%d of %d bytes are synced", w.synced, w.size)
	}
}

func TestAHeadIsDueASecondAfterAnEntry(t *testing.T) {
	w := startOn(t, newTestDisk(), FsyncAlways, 1<<20, 0)
	if err := w.flush(false); err != nil {
		t.Fatal(err)
	}
	w.now = 400
	if due := w.due(w.now); due != 600 {
		t.Errorf("due in %d ms", due)
	}
	w.now = 1000
	if due := w.due(w.now); due != 0 {
		t.Errorf("due in %d ms", due)
	}
	if err := w.flush(false); err != nil || w.due(w.now) != -1 {
		t.Errorf("%v, due in %d ms", err, w.due(w.now))
	}
}

func TestAFileThatWasMovedAwayIsFollowedByANewOne(t *testing.T) {
	d := newTestDisk()
	w := startOn(t, d, FsyncAlways, 1<<20, 0)
	w.add(3)
	if err := w.flush(false); err != nil {
		t.Fatal(err)
	}
	if err := d.rename(testPath, testPath+".000000000001"); err != nil { // somebody does
		t.Fatal(err)
	}
	w.add(1)

	err := w.flush(true)

	if all := d.log(t, testPath); err != nil || len(all) != 8 || d.names[testPath] == nil { // open, 4 entries, head, open, head
		t.Errorf("%d lines, %v", len(all), err)
	}
}

func TestAChainThatCannotBeContinuedIsRefused(t *testing.T) {
	whole := func() string {
		d := newTestDisk()
		w := startOn(t, d, FsyncAlways, 1<<20, 0)
		if err := w.flush(true); err != nil {
			t.Fatal(err)
		}
		return string(d.names[testPath].data)
	}()
	for name, c := range map[string]struct{ current, rotated, says string }{
		"an edited last line":            {current: strings.Replace(whole, `"head"`, `"hEad"`, 1), says: "its last line"},
		"a torn rotated file":            {rotated: whole[:len(whole)-1], says: "is not whole"},
		"an empty rotated file":          {rotated: "\n", says: "is not whole"},
		"text":                           {current: "hello\n", says: "its last line"},
		"a rotated file that was edited": {rotated: strings.Replace(whole, `"open"`, `"oPen"`, 1), says: "its first line"},
	} {
		dir := t.TempDir()
		path := filepath.Join(dir, "audit.jsonl")
		if c.rotated != "" {
			if err := os.WriteFile(path+suffix(1), []byte(c.rotated), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(path, []byte(c.current), 0o600); err != nil {
			t.Fatal(err)
		}

		_, err := openJournal(realDisk{}, path, FsyncAlways, Writer{}, testKey(), 1<<20, 0)

		if err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", name, err)
		}
		if after := must(os.ReadFile(path)); string(after) != c.current {
			t.Errorf("%s: the file has changed", name)
		}
	}
}

func TestTwoWritersDoNotShareALog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	first, err := openJournal(realDisk{}, path, FsyncAlways, Writer{}, testKey(), 1<<20, 0)
	if err != nil {
		t.Fatal(err)
	}

	_, err = openJournal(realDisk{}, path, FsyncAlways, Writer{}, testKey(), 1<<20, 0)

	if err == nil || !strings.Contains(err.Error(), "another process writes it") {
		t.Errorf("%v", err)
	}
	if err := first.file.Close(); err != nil {
		t.Error(err)
	}
}

func TestWhatIsNoFileIsRefused(t *testing.T) {
	dir := t.TempDir()
	link := filepath.Join(dir, "link")
	if err := os.Symlink(filepath.Join(dir, "elsewhere"), link); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{link, "/dev/null", dir} {
		if f, err := (realDisk{}).open(path); err == nil {
			t.Errorf("%s opens: %v", path, f.Close())
		}
	}
}
