package sentry

import "golang.org/x/sys/unix"

// connection is the connection to the agent. Only plain calls are used, because the filters of the Sentry allow no others:
// read, write and shutdown. The descriptor is never closed: its number could then belong to another file while a
// goroutine still writes to it.
type connection int

func again(call func() error) error {
	for {
		if err := call(); err != unix.EINTR {
			return err
		}
	}
}

// Read implements io.Reader, but returns 0 without an error at the end.
func (c connection) Read(b []byte) (n int, err error) {
	err = again(func() error {
		n, err = unix.Read(int(c), b)
		return err
	})
	return max(n, 0), err
}

// Write implements io.Writer.
func (c connection) Write(b []byte) (written int, err error) {
	for written < len(b) {
		var n int
		err := again(func() error {
			n, err = unix.Write(int(c), b[written:])
			return err
		})
		if err != nil {
			return written, err
		}
		written += n
	}
	return written, nil
}

// Close implements io.Closer. Reads and writes that are under way end.
func (c connection) Close() error { return unix.Shutdown(int(c), unix.SHUT_RDWR) }
