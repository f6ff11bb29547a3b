package audit

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"

	"golang.org/x/sys/unix"
)

// disk is the file system as a journal uses it; tests put failures in its place.
type disk interface {
	// open opens or makes a file and locks it: two writers would make two chains.
	open(path string) (file, error)
	// rename gives a file a name that is not taken.
	rename(path, target string) error
	// syncFolder makes the names in a folder durable.
	syncFolder(folder string) error
	// newestRotated is the file that was full before path; "" when there is none.
	newestRotated(path string) (string, error)
	// ends reads the ends of a file that nobody writes any more.
	ends(path string) (found, error)
}

// file is one open file.
type file interface {
	io.ReaderAt
	// Write appends; after an error a part may be there.
	io.Writer
	io.Closer
	size() (int64, error)
	truncate(size int64) error
	sync() error
	// isAt tells whether path leads here.
	isAt(path string) (bool, error)
}

type realDisk struct{}

type realFile struct{ *os.File }

func (realDisk) open(path string) (file, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_APPEND|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o640)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = errors.New("it is no regular file")
	}
	if err == nil {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
			err = errors.New("another process writes it")
		}
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return realFile{f}, nil
}

func (realDisk) rename(path, target string) error {
	if _, err := os.Lstat(target); err == nil { // only the writer, which holds the lock, makes such names
		return fmt.Errorf("%s: %w", target, fs.ErrExist)
	}
	return os.Rename(path, target)
}

func (realDisk) syncFolder(folder string) error {
	f, err := os.Open(folder)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func (f realFile) size() (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

func (f realFile) truncate(size int64) error { return f.Truncate(size) }

func (f realFile) sync() error { return unix.Fdatasync(int(f.Fd())) }

func (f realFile) isAt(path string) (bool, error) {
	there, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	here, err := f.Stat()
	return err == nil && os.SameFile(here, there), err
}

var rotatedName = regexp.MustCompile(`^\.\d{12,18}$`)

func (realDisk) newestRotated(path string) (string, error) {
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		return "", err
	}
	base := filepath.Base(path)
	newest, newestSeq := "", int64(-1)
	for _, entry := range entries {
		name := entry.Name()
		if len(name) <= len(base) || name[:len(base)] != base || !rotatedName.MatchString(name[len(base):]) {
			continue
		}
		if seq, err := strconv.ParseInt(name[len(base)+1:], 10, 64); err == nil && seq > newestSeq {
			newest, newestSeq = filepath.Join(filepath.Dir(path), name), seq
		}
	}
	return newest, nil
}

func (realDisk) ends(path string) (found, error) {
	f, err := os.Open(path)
	if err != nil {
		return found{}, err
	}
	defer f.Close()
	size, err := realFile{f}.size()
	if err != nil {
		return found{}, err
	}
	return readEnds(f, size)
}
