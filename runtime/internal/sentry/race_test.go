//go:build sandbox

package sentry

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// raceTime is how long each path is raced. KALIUM_RACE sets it; test-guard takes ten seconds.
func raceTime() time.Duration {
	if d, err := time.ParseDuration(os.Getenv("KALIUM_RACE")); err == nil {
		return d
	}
	return time.Second
}

// racedPaths are the system calls that send, as ways are. Each is raced in an invocation of its own.
var racedPaths = []string{"write", "writev", "pwritev2", "sendto", "sendmsg", "sendmmsg", "sendfile", "splice", "io_submit"}

// TestAChangedDescriptorIsNoWayOut has one thread send to a descriptor while another puts a pipe, a loopback connection
// and a guarded connection there in turn. A hook in front of a system call lost this race; the endpoint has no descriptor
// to look up. Stock gVisor shows that the same program delivers what it sends.
func TestAChangedDescriptorIsNoWayOut(t *testing.T) {
	for _, runtime := range []string{"runsc-stock", "runsc-kalium"} {
		t.Run(runtime, func(t *testing.T) {
			s := newSite(t)
			s.runtime = runtimePath(t, runtime)
			s.welcome = lasting(t, "enforce")
			if runtime == "runsc-kalium" {
				s.env = []string{"KALIUM_RACE=" + raceTime().String()}
			} else {
				s.env = []string{"KALIUM_RACE=" + min(raceTime(), time.Second).String()}
			}
			r := receive(s.listen(8080))
			wait := s.run("race", runtime == "runsc-kalium")
			arrived, made := 0, 0
			for _, path := range racedPaths {
				answer := s.request(empty)
				_, result, found := strings.Cut(answer, path+": ")
				var tries, changes, connections int
				if _, err := fmt.Sscanf(result, raceResult, &tries, &changes, &connections); !found || err != nil {
					t.Fatalf("answer %q: %v", answer, err)
				}
				made += connections
				bytes := r.settled(t, made)
				t.Logf("%s: %s; %d denied bytes arrived", path, answer[strings.Index(answer, "\r\n\r\n")+4:], len(bytes)-arrived)
				// gVisor takes io_submit for a write at a position, which no socket has.
				if works := runtime == "runsc-stock" && path != "io_submit"; works != (len(bytes) > arrived) {
					t.Errorf("%s: %d bytes arrived", path, len(bytes)-arrived)
				}
				arrived = len(bytes)
			}
			wait()
			if _, bytes := r.state(); runtime == "runsc-kalium" && bytes != "" {
				t.Errorf("%q arrived", bytes[:min(len(bytes), 100)])
			}
		})
	}
}

const raceResult = "%d tries, %d changes, %d connections"

// race returns what answers the next request: it races one path after the other.
func race() func(*bufio.Reader) string {
	next := 0
	return func(*bufio.Reader) string {
		path := racedPaths[next]
		next++
		tries, changes, connections, err := racePath(path)
		if err != nil {
			return path + " failed: " + err.Error()
		}
		return fmt.Sprintf("%s: "+raceResult, path, tries, changes, connections)
	}
}

// racePath sends by one path to a descriptor that changes.
func racePath(path string) (tries, changes, connections int, err error) {
	const target = 500
	harmless, err := harmlessTargets()
	if err != nil {
		return 0, 0, 0, err
	}
	send, err := sender(path)
	if err != nil {
		return 0, 0, 0, err
	}
	unix.Dup3(harmless[0], target, 0)
	end := time.Now().Add(raceTime())
	var changed atomic.Int64
	done := make(chan struct{})
	go func() {
		defer close(done)
		for time.Now().Before(end) {
			fd, err := dial()
			if err != nil {
				continue
			}
			connections++
			for i := range 50 {
				unix.Dup3(harmless[i%len(harmless)], target, 0)
				unix.Dup3(fd, target, 0)
				changed.Add(2)
			}
			unix.Dup3(harmless[0], target, 0)
			unix.Close(fd)
		}
	}()
	for ; time.Now().Before(end); tries++ {
		send(target)
	}
	<-done
	unix.Close(target)
	for _, fd := range harmless {
		unix.Close(fd)
	}
	return tries, int(changed.Load()), connections, nil
}

// harmlessTargets are a pipe and a loopback connection that take whatever is sent.
func harmlessTargets() ([]int, error) {
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], 0); err != nil {
		return nil, err
	}
	go io.Copy(io.Discard, os.NewFile(uintptr(pipe[0]), "pipe"))
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	defer listener.Close()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		return nil, err
	}
	port := listener.Addr().(*net.TCPAddr).Port
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		return nil, err
	}
	conn, err := listener.Accept()
	if err != nil {
		return nil, err
	}
	go io.Copy(io.Discard, conn)
	return []int{pipe[1], fd}, nil
}

// sender returns a function that sends secret once by a path. What comes of it does not matter.
func sender(path string) (func(fd int), error) {
	switch path {
	case "write":
		return func(fd int) { unix.Write(fd, secret) }, nil
	case "writev":
		return func(fd int) { unix.Writev(fd, [][]byte{secret[:5], secret[5:]}) }, nil
	case "pwritev2":
		return func(fd int) { unix.Pwritev2(fd, [][]byte{secret}, -1, 0) }, nil
	case "sendto":
		return func(fd int) { unix.Send(fd, secret, unix.MSG_NOSIGNAL) }, nil
	case "sendmsg":
		return func(fd int) { unix.SendmsgN(fd, secret, nil, nil, unix.MSG_NOSIGNAL) }, nil
	case "sendmmsg":
		vector := unix.Iovec{Base: &secret[0]}
		vector.SetLen(len(secret))
		header := &struct {
			unix.Msghdr
			sent uint32
			_    uint32
		}{Msghdr: unix.Msghdr{Iov: &vector, Iovlen: 1}}
		return func(fd int) {
			unix.Syscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(header)), 1, unix.MSG_NOSIGNAL, 0, 0)
		}, nil
	case "sendfile":
		name := filepath.Join("/tmp", "raced")
		if err := os.WriteFile(name, secret, 0o600); err != nil {
			return nil, err
		}
		file, err := unix.Open(name, unix.O_RDONLY, 0)
		if err != nil {
			return nil, err
		}
		return func(fd int) {
			offset := int64(0)
			unix.Sendfile(fd, file, &offset, len(secret))
		}, nil
	case "splice":
		var pipe [2]int
		if err := unix.Pipe2(pipe[:], unix.O_NONBLOCK); err != nil {
			return nil, err
		}
		return func(fd int) {
			unix.Write(pipe[1], secret)
			unix.Splice(pipe[0], nil, fd, nil, len(secret), 0)
		}, nil
	case "io_submit":
		return func(fd int) { submit(fd, secret) }, nil
	}
	return nil, fmt.Errorf("no path %q", path)
}
