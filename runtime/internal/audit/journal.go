package audit

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
)

// When a log is made durable.
const (
	FsyncAlways   = "always"   // behind each batch
	FsyncInterval = "interval" // at most a second after a write
	FsyncNever    = "never"    // when the system likes
)

const (
	syncMS           = 1000    // of FsyncInterval: the longest that written lines wait
	retryMS          = 1000    // after a failure
	unsyncedBytesMax = 4 << 20 // they are kept in memory, so that many are made durable earlier
	tornBytesMax     = 2 << 20 // a batch is smaller, so more than this without a line feed is no torn line of ours
	logHex           = 16
)

// Relations between the bounds; a negative length does not compile.
var _ [tornBytesMax - pendingBytesMax - lineBytesMax]struct{}

// journal brings a chain to the disk: found again at the start, written in batches, healed after a failure. Files are never
// deleted. The current one is path; one that is full is path with the number of its first entry behind it.
//
// It is used by one goroutine. The chain may be shared, and is then locked around begin and due, too.
type journal struct {
	path  string
	fsync string
	disk  disk
	file  file
	chain *Chain

	size        int64    // of what was written whole
	synced      int64    // bytes that survive a power cut
	unsynced    [][]byte // what was written behind them
	backlog     []Part   // taken from the chain, not written
	isTorn      bool     // a write has failed: a part of it may be there
	isUnsure    bool     // a sync has failed: what was written since the last one may be lost
	isPlaced    bool     // the name of the file is durable
	hasUnsynced bool
	unsyncedMS  int64 // since when something waits to be synced
	hasFailed   bool
	retryMS     int64

	written Place
	durable Place // the last entry that is there for good, as far as fsync goes
}

// openJournal finds the chain, or begins one. On an error nothing has changed.
func openJournal(d disk, path, fsync string, who Writer, key ed25519.PrivateKey, bytesMax, nowMS int64) (*journal, error) {
	f, err := d.open(path)
	if err != nil {
		return nil, err
	}
	j := &journal{path: path, fsync: fsync, disk: d, file: f}
	torn, err := j.resume(who, key, bytesMax)
	if err == nil && len(torn) > 0 {
		err = f.truncate(j.size)
	}
	if err == nil && fsync != FsyncNever {
		// What a writer that was killed had written may not be on the disk yet, and is not in our memory.
		err = errors.Join(f.sync(), d.syncFolder(filepath.Dir(path)))
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	j.synced, j.isPlaced = j.size, true
	j.written, j.durable = j.chain.Place, j.chain.Place
	j.chain.Open(nowMS, torn)
	return j, nil
}

// resume makes the chain behind what is in the files, and returns the torn line of the current one.
func (j *journal) resume(who Writer, key ed25519.PrivateKey, bytesMax int64) ([]byte, error) {
	size, err := j.file.size()
	if err != nil {
		return nil, err
	}
	current, err := readEnds(j.file, size)
	if err != nil {
		return nil, err
	}
	j.chain = &Chain{Who: who, Key: key, BytesMax: bytesMax}
	if current.wholeBytes > 0 {
		j.size = current.wholeBytes
		j.chain.Who.Log, j.chain.Place = current.log, current.last
		j.chain.FileSeq, j.chain.FileBytes = current.firstSeq, current.wholeBytes
		return current.torn, nil
	}
	before, err := j.disk.newestRotated(j.path)
	if err != nil {
		return nil, err
	}
	if before == "" {
		var log [logHex / 2]byte
		rand.Read(log[:]) // never fails, see its documentation
		j.chain.Who.Log = hex.EncodeToString(log[:])
		return current.torn, nil
	}
	older, err := j.disk.ends(before)
	if err != nil || older.wholeBytes == 0 || len(older.torn) > 0 {
		return nil, errors.Join(fmt.Errorf("%s, the file before it, is not whole", filepath.Base(before)), err)
	}
	j.chain.Who.Log, j.chain.Place = older.log, older.last
	return current.torn, nil
}

// due is in how many milliseconds a flush has work without new entries; -1: never.
func (j *journal) due(nowMS int64) int64 {
	if j.hasFailed {
		return max(0, min(retryMS, j.retryMS-nowMS))
	}
	due := int64(-1)
	sooner := func(wait int64) {
		if due < 0 || wait < due {
			due = wait
		}
	}
	if j.chain.hasUnsigned {
		if j.chain.HeadDue(nowMS) {
			return 0
		}
		sooner(j.chain.unsignedMS + headMS - nowMS)
	}
	if j.hasUnsynced {
		sooner(max(0, min(syncMS, j.unsyncedMS+syncMS-nowMS)))
	}
	return due
}

// isMoved tells whether somebody has moved or removed the current file, so that a new one has to be begun.
func (j *journal) isMoved() (bool, error) {
	here, err := j.file.isAt(j.path)
	return !here, err
}

// begin takes what the chain has, with a head when one is due; end writes it.
func (j *journal) begin(nowMS int64, isLast, isMoved bool) Place {
	if isMoved && !slices.ContainsFunc(j.backlog, func(part Part) bool { return part.Rotated != "" }) {
		j.chain.StartFile(nowMS)
	}
	if isLast || j.chain.HeadDue(nowMS) {
		j.chain.Seal(nowMS)
	}
	j.backlog = append(j.backlog, j.chain.Take()...)
	return j.chain.Place
}

// end writes and syncs what is due. After an error nothing is lost, and the next call goes on from there.
func (j *journal) end(place Place, nowMS int64, isLast bool) error {
	err := j.write(place, nowMS, isLast)
	j.hasFailed = false
	if err != nil {
		j.fail(nowMS)
	}
	return err
}

// fail lets the next flush be due a while later.
func (j *journal) fail(nowMS int64) {
	j.hasFailed, j.retryMS = true, nowMS+retryMS
}

func (j *journal) write(place Place, nowMS int64, isLast bool) error {
	if err := j.repair(); err != nil {
		return err
	}
	for len(j.backlog) > 0 {
		part := &j.backlog[0]
		if part.Rotated != "" {
			if err := j.rotate(part.Rotated); err != nil {
				return err
			}
			part.Rotated = ""
		}
		if err := j.append(part.Data); err != nil {
			return err
		}
		j.backlog = j.backlog[1:]
		if j.fsync == FsyncNever {
			continue
		}
		j.unsynced = append(j.unsynced, part.Data)
		if !j.hasUnsynced {
			j.hasUnsynced, j.unsyncedMS = true, nowMS
		}
	}
	j.backlog = nil
	j.written = place
	if j.fsync == FsyncNever {
		j.durable = place
		return nil
	}
	if j.hasUnsynced && (isLast || j.isSyncDue(nowMS)) {
		return j.syncAll()
	}
	return nil
}

func (j *journal) isSyncDue(nowMS int64) bool {
	return j.fsync == FsyncAlways || nowMS < j.unsyncedMS || nowMS-j.unsyncedMS >= syncMS || j.size-j.synced >= unsyncedBytesMax
}

func (j *journal) append(data []byte) error {
	j.isTorn = true
	if _, err := j.file.Write(data); err != nil {
		return err
	}
	j.isTorn = false
	j.size += int64(len(data))
	return nil
}

// repair brings the file into the state that the last success left.
//
// After a failed sync Linux calls pages clean that never reached the disk, so that a second sync would succeed and prove
// nothing: what was not synced is written again.
func (j *journal) repair() error {
	if j.isTorn {
		if err := j.file.truncate(j.size); err != nil {
			return err
		}
		j.isTorn = false
	}
	if !j.isUnsure {
		return nil
	}
	if err := j.file.truncate(j.synced); err != nil {
		return err
	}
	j.size = j.synced
	if err := j.append(slices.Concat(j.unsynced...)); err != nil {
		return err
	}
	return j.syncAll()
}

func (j *journal) syncAll() error {
	j.isUnsure = true
	if err := j.file.sync(); err != nil {
		return err
	}
	if !j.isPlaced {
		if err := j.disk.syncFolder(filepath.Dir(j.path)); err != nil {
			return err
		}
		j.isPlaced = true
	}
	j.isUnsure, j.hasUnsynced = false, false
	j.synced, j.durable = j.size, j.written
	j.unsynced = nil
	return nil
}

// rotate goes on in a new file. Cut off in between, the next start finds the chain in the file that has been renamed.
func (j *journal) rotate(behind string) error {
	if j.fsync != FsyncNever {
		if err := j.syncAll(); err != nil {
			return err
		}
	}
	moved, err := j.isMoved()
	if err != nil {
		return err
	}
	if !moved {
		if err := j.disk.rename(j.path, j.path+behind); err != nil {
			return err
		}
	}
	f, err := j.disk.open(j.path)
	if err != nil {
		return err
	}
	size, err := f.size()
	if err == nil && size > 0 {
		err = errors.New("a file that another process has begun is in its place")
	}
	if err != nil {
		return errors.Join(err, f.Close())
	}
	_ = j.file.Close() // every write and every sync of it was checked
	j.file, j.size, j.synced, j.isPlaced = f, 0, 0, false
	return nil
}

func (j *journal) unwritten() int {
	n := 0
	for _, part := range j.backlog {
		n += len(part.Data)
	}
	return n
}
