//go:build sandbox

package sentry

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What follows runs inside of the sandbox, as the function.

const leavingBytes = 1 << 20 // more than both ends' buffers hold

func inside(scenario string) int {
	switch scenario {
	case "calls":
		return print(tryCalls())
	case "send":
		_, err := dial()
		fmt.Printf("connect: %s\n", name(err))
		return 0
	case "wait":
		unix.Pause()
		return 0
	case "leave":
		fd, err := dial()
		for left := leavingBytes; left > 0 && err == nil; {
			var n int
			n, err = unix.Write(fd, make([]byte, min(left, 64<<10)))
			left -= n
		}
		fmt.Printf("written: %s\n", name(err))
		return 0
	case "ways":
		return answer(1, func(*bufio.Reader) string { raw, _ := json.Marshal(tryWays()); return string(raw) })
	case "secure":
		return answer(1, func(*bufio.Reader) string { raw, _ := json.Marshal(trySecure()); return string(raw) })
	case "race":
		return answer(len(racedPaths), race())
	case "table":
		return print(tryTable())
	case "user namespace":
		return print(tryUserNamespace())
	case "files":
		return print(tryFiles())
	case "count":
		requests := 0
		return answer(2, func(r *bufio.Reader) string {
			requests++
			token := ""
			for {
				line, err := r.ReadString('\n')
				if err != nil || line == "\r\n" {
					return fmt.Sprintf("request %d, token %q", requests, token)
				}
				if strings.HasPrefix(strings.ToLower(line), "x-kalium-token:") {
					token = line
				}
			}
		})
	}
	fmt.Println("no such scenario:", scenario)
	return 1
}

func print(v any) int {
	if err := json.NewEncoder(os.Stdout).Encode(v); err != nil {
		return 1
	}
	return 0
}

// name spells an error as errno(3) does.
func name(err error) string {
	if err == nil {
		return "ok"
	}
	var number unix.Errno
	if errors.As(err, &number) {
		return unix.ErrnoName(number)
	}
	return err.Error()
}

func dial() (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: 8080, Addr: [4]byte{10, 137, 0, 1}}); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// answer serves connections on the declared port. One that ends without a request is not counted.
func answer(connections int, f func(*bufio.Reader) string) int {
	listener, err := net.Listen("tcp4", ":8080")
	if err != nil {
		fmt.Println(err)
		return 1
	}
	for connections > 0 {
		connections--
		conn, err := listener.Accept()
		if err != nil {
			fmt.Println(err)
			return 1
		}
		r := bufio.NewReader(conn)
		if _, err := r.Peek(1); err != nil {
			conn.Close()
			continue
		}
		body := f(r)
		fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
		conn.Close()
	}
	return 0
}

func tryCalls() map[string]string {
	got := map[string]string{}
	socket := func(what string, family, kind, protocol int) {
		fd, err := unix.Socket(family, kind, protocol)
		got[what] = name(err)
		if err == nil {
			unix.Close(fd)
		}
	}
	socket("stream", unix.AF_INET, unix.SOCK_STREAM, 0)
	socket("datagram", unix.AF_INET6, unix.SOCK_DGRAM, 0)
	socket("unix", unix.AF_UNIX, unix.SOCK_STREAM, 0)
	socket("netlink route", unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE)
	socket("raw", unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_TCP)
	socket("icmp", unix.AF_INET, unix.SOCK_DGRAM, unix.IPPROTO_ICMP)
	socket("packet", unix.AF_PACKET, unix.SOCK_RAW, 0)
	socket("vsock", unix.AF_VSOCK, unix.SOCK_STREAM, 0)
	socket("netlink netfilter", unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_NETFILTER)
	_, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	got["unix pair"] = name(err)
	_, err = unix.Socketpair(unix.AF_INET, unix.SOCK_STREAM, 0)
	got["internet pair"] = name(err)
	var params [120]byte
	_, _, number := unix.Syscall(unix.SYS_IO_URING_SETUP, 4, uintptr(unsafe.Pointer(&params)), 0)
	got["io_uring"] = name(number)

	stream, _ := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	got["kernel tls"] = name(unix.SetsockoptString(stream, unix.SOL_TCP, unix.TCP_ULP, "tls"))
	got["bind to device"] = name(unix.SetsockoptString(stream, unix.SOL_SOCKET, unix.SO_BINDTODEVICE, "eth0"))
	datagram, _ := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	group := &unix.IPMreqn{Multiaddr: [4]byte{224, 1, 2, 3}, Ifindex: 2}
	got["multicast"] = name(unix.SetsockoptIPMreqn(datagram, unix.SOL_IP, unix.IP_ADD_MEMBERSHIP, group))

	got["unshare"] = name(unix.Unshare(unix.CLONE_NEWNET))
	_, _, number = unix.RawSyscall6(unix.SYS_CLONE, unix.CLONE_NEWNET|uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	got["clone"] = name(number)
	args := [11]uint64{0: unix.CLONE_NEWNET, 4: uint64(unix.SIGCHLD)}
	_, _, number = unix.RawSyscall(unix.SYS_CLONE3, uintptr(unsafe.Pointer(&args)), unsafe.Sizeof(args), 0)
	got["clone3"] = name(number)
	self, _ := unix.Open("/proc/self/ns/net", unix.O_RDONLY, 0)
	got["setns"] = name(unix.Setns(self, unix.CLONE_NEWNET))
	got["setns of any kind"] = name(unix.Setns(self, 0))
	tun := [40]byte{}
	_, _, number = unix.Syscall(unix.SYS_IOCTL, uintptr(stream), unix.TUNSETIFF, uintptr(unsafe.Pointer(&tun)))
	got["tun"] = name(number)

	got["loopback"] = name(func() error {
		listener, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			return err
		}
		client, err := net.Dial("tcp4", listener.Addr().String())
		if err != nil {
			return err
		}
		server, err := listener.Accept()
		if err != nil {
			return err
		}
		if _, err := client.Write([]byte("x")); err != nil {
			return err
		}
		_, err = io.ReadFull(server, make([]byte, 1))
		return err
	}())
	return got
}

var ways = []string{"write", "writev", "pwritev2", "sendto", "sendto with address", "sendmsg", "sendmmsg", "sendfile", "splice", "io_submit", "MSG_OOB"}

// secret is a message that no policy lists.
var secret = []byte("GET /secret HTTP/1.1\r\nHost: api.test:8080\r\n\r\n")

// tryWays sends secret by every system call that can send, each on a connection of its own.
func tryWays() map[string]string {
	message := secret
	file, err := os.CreateTemp("/tmp", "")
	if err != nil {
		return map[string]string{"file": err.Error()}
	}
	file.Write(message)
	got := map[string]string{}
	for _, way := range ways {
		fd, err := dial()
		if err != nil {
			got[way] = "connect: " + name(err)
			continue
		}
		switch way {
		case "write":
			_, err = unix.Write(fd, message)
		case "writev":
			_, err = unix.Writev(fd, [][]byte{message[:5], message[5:]})
		case "pwritev2":
			_, err = unix.Pwritev2(fd, [][]byte{message}, -1, 0)
		case "sendto":
			err = unix.Send(fd, message, 0)
		case "sendto with address":
			err = unix.Sendto(fd, message, unix.MSG_FASTOPEN, &unix.SockaddrInet4{Port: 9, Addr: [4]byte{10, 137, 0, 1}})
		case "sendmsg":
			_, err = unix.SendmsgN(fd, message, nil, nil, 0)
		case "sendmmsg":
			vector := unix.Iovec{Base: &message[0]}
			vector.SetLen(len(message))
			header := struct {
				unix.Msghdr
				sent uint32
				_    uint32
			}{Msghdr: unix.Msghdr{Iov: &vector, Iovlen: 1}}
			_, _, number := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&header)), 1, 0, 0, 0)
			err = errno(number)
		case "sendfile":
			offset := int64(0)
			_, err = unix.Sendfile(fd, int(file.Fd()), &offset, len(message))
		case "splice":
			var pipe [2]int
			if err = unix.Pipe2(pipe[:], 0); err == nil {
				unix.Write(pipe[1], message)
				_, err = unix.Splice(pipe[0], nil, fd, nil, len(message), 0)
			}
		case "io_submit":
			err = submit(fd, message)
		case "MSG_OOB":
			err = unix.Send(fd, message, unix.MSG_OOB)
		}
		got[way] = name(err)
		unix.Close(fd)
	}
	return got
}

func errno(number unix.Errno) error {
	if number == 0 {
		return nil
	}
	return number
}

// submit writes by asynchronous input and output (io_submit(2)) and returns what became of it.
func submit(fd int, message []byte) error {
	var context uintptr
	if _, _, number := unix.Syscall(unix.SYS_IO_SETUP, 1, uintptr(unsafe.Pointer(&context)), 0); number != 0 {
		return number
	}
	type block struct {
		data           uint64
		key, rwFlags   uint32
		opcode, prio   uint16
		fd             uint32
		buffer, length uint64
		offset         int64
		_              [2]uint64
	}
	b := &block{opcode: 1, fd: uint32(fd), buffer: uint64(uintptr(unsafe.Pointer(&message[0]))), length: uint64(len(message))}
	list := []*block{b}
	if _, _, number := unix.Syscall(unix.SYS_IO_SUBMIT, context, 1, uintptr(unsafe.Pointer(&list[0]))); number != 0 {
		return number
	}
	var event [4]int64
	if _, _, number := unix.Syscall6(unix.SYS_IO_GETEVENTS, context, 1, 1, uintptr(unsafe.Pointer(&event)), 0, 0); number != 0 {
		return number
	}
	if result := event[2]; result < 0 {
		return unix.Errno(-result)
	}
	return nil
}
