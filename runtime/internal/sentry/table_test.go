//go:build sandbox

package sentry

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/abi/linux"
	calls "gvisor.dev/gvisor/pkg/sentry/syscalls/linux"

	"kalium.dev/kalium/runtime/internal/mediation"
)

// tried is what a scenario found: how many things it tried, and which did not do as the table says.
type tried struct {
	Count int
	Wrong []string
}

func (r *tried) want(what string, err error, want ...error) {
	r.Count++
	for _, w := range want {
		if err == w {
			return
		}
	}
	r.Wrong = append(r.Wrong, fmt.Sprintf("%s: %s, want %v", what, name(err), want))
}

// ask runs a scenario that returns what it tried.
func (s *site) ask(scenario string) tried {
	s.t.Helper()
	output := s.run(scenario, true)()
	var got tried
	if err := json.Unmarshal([]byte(output), &got); err != nil {
		s.t.Fatalf("%v in %q", err, output)
	}
	for _, wrong := range got.Wrong {
		s.t.Error(wrong)
	}
	return got
}

// TestTheTableHoldsInside tries everything in the table that can be asked for by a number.
func TestTheTableHoldsInside(t *testing.T) {
	if got := newSite(t).ask("table"); got.Count < 9000 {
		t.Errorf("only %d things were tried", got.Count)
	} else {
		t.Logf("%d things tried", got.Count)
	}
}

func TestAUserNamespaceGivesNoPowerOverTheNetwork(t *testing.T) {
	if got := newSite(t).ask("user namespace"); got.Count < 10 {
		t.Errorf("only %d things were tried", got.Count)
	}
}

func tryTable() tried {
	var r tried
	r.sockets()
	r.options()
	r.requests()
	for _, call := range calls.AMD64.Table {
		line, _ := mediation.Of(mediation.Calls, call.Name)
		if line.Class != mediation.Refused {
			continue
		}
		for number, c := range calls.AMD64.Table {
			if c.Name == call.Name {
				_, _, failed := unix.Syscall6(number, 0, 0, 0, 0, 0, 0)
				r.want(call.Name, errno(failed), unix.ENOSYS)
			}
		}
	}
	local, _ := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	for flag, name := range map[int]string{unix.MSG_ZEROCOPY: "MSG_ZEROCOPY", 0x8000000: "MSG_SPLICE_PAGES"} {
		_, err := unix.SendmsgN(local[0], []byte("x"), nil, nil, flag)
		r.want("sendmsg "+name, err, unix.EINVAL)
	}
	return r
}

// sockets asks for all families, types and a good many protocols.
func (r *tried) sockets() {
	protocols := []int{0, 1, 2, 6, 17, 33, 41, 46, 47, 50, 58, 89, 99, 115, 132, 136, 255, 262, -1}
	for family := range 50 {
		for _, kind := range []int{0, 1, 2, 3, 4, 5, 6, 10, 11} {
			for _, protocol := range protocols {
				r.socket(family, kind, protocol)
			}
			if family == unix.AF_NETLINK {
				for protocol := range 32 {
					r.socket(family, kind, protocol)
				}
			}
		}
	}
	for family := range 50 {
		if family != unix.AF_UNIX {
			_, err := unix.Socketpair(family, unix.SOCK_STREAM, 0)
			r.want(fmt.Sprintf("socketpair %d", family), err, unix.EAFNOSUPPORT)
		}
	}
}

func (r *tried) socket(family, kind, protocol int) {
	fd, err := unix.Socket(family, kind, protocol)
	if err == nil {
		unix.Close(fd)
	}
	what := fmt.Sprintf("socket(%d, %d, %d)", family, kind, protocol)
	switch mediation.SocketClass(family, linux.SockType(kind), protocol) {
	case mediation.EndsAtEndpoint:
		r.want(what, err, nil)
	case mediation.Refused:
		r.want(what, err, unix.EPERM, unix.EPROTONOSUPPORT, unix.EAFNOSUPPORT)
	default: // gVisor knows types that it does not have
		r.want(what, err, nil, unix.EPROTONOSUPPORT, unix.ESOCKTNOSUPPORT, unix.EINVAL)
	}
}

// options sets every refused option, and numbers that are none, on sockets of each kind.
func (r *tried) options() {
	value := string(make([]byte, 136))
	for _, s := range [][3]int{{unix.AF_INET, unix.SOCK_STREAM}, {unix.AF_INET6, unix.SOCK_DGRAM}, {unix.AF_UNIX, unix.SOCK_STREAM}, {unix.AF_NETLINK, unix.SOCK_RAW}} {
		fd, err := unix.Socket(s[0], s[1], s[2])
		if err != nil {
			r.want("socket", err)
			continue
		}
		for _, o := range mediation.EachOption() {
			if o.Class == mediation.Refused {
				r.want(fmt.Sprintf("%s on family %d", o.Name, s[0]), unix.SetsockoptString(fd, int(o.Level), int(o.Number), value), unix.ENOPROTOOPT)
			}
		}
		for _, level := range []int{unix.SOL_SOCKET, unix.SOL_IP, unix.SOL_IPV6, unix.SOL_TCP, unix.SOL_UDP, unix.SOL_TLS, 132, 284, 12345} {
			r.want(fmt.Sprintf("option %d 12345", level), unix.SetsockoptString(fd, level, 12345, value), unix.ENOPROTOOPT)
		}
		unix.Close(fd)
	}
}

// requests makes every refused ioctl and some that are none.
func (r *tried) requests() {
	fd, _ := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	var memory [256]byte
	ask := func(what string, number uint32) {
		_, _, failed := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(number), uintptr(unsafe.Pointer(&memory)))
		r.want(what, errno(failed), unix.ENOTTY)
	}
	for _, i := range mediation.EachIoctl() {
		if i.Class == mediation.Refused {
			ask(i.Name, i.Number)
		}
	}
	for _, number := range []uint32{0, 0x1234, unix.SIOCSIFADDR, unix.SIOCADDRT, unix.SIOCBRADDBR, unix.SIOCSIFFLAGS, unix.FICLONE} {
		ask(fmt.Sprintf("ioctl %#x", number), number)
	}
}

// tryUserNamespace runs itself again in a user namespace of its own, with all capabilities there.
func tryUserNamespace() tried {
	var r tried
	if os.Getenv("KALIUM_NESTED") == "" {
		again := exec.Command("/inside")
		again.Env = append(os.Environ(), "KALIUM_NESTED=1")
		again.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER}
		output, err := again.Output()
		if err == nil {
			err = json.Unmarshal(output, &r)
		}
		if err != nil {
			r.Wrong = append(r.Wrong, err.Error())
		}
		return r
	}
	for _, s := range [][3]int{{unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_TCP}, {unix.AF_INET6, unix.SOCK_RAW, unix.IPPROTO_RAW}, {unix.AF_PACKET, unix.SOCK_RAW, 0}, {unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_NETFILTER}} {
		_, err := unix.Socket(s[0], s[1], s[2])
		r.want(fmt.Sprint("socket ", s), err, unix.EPERM, unix.EAFNOSUPPORT, unix.EPROTONOSUPPORT)
	}
	r.want("unshare", unix.Unshare(unix.CLONE_NEWNET), unix.EPERM)
	r.want("unshare of two", unix.Unshare(unix.CLONE_NEWNET|unix.CLONE_NEWUTS), unix.EPERM)
	self, _ := unix.Open("/proc/self/ns/net", unix.O_RDONLY, 0)
	r.want("setns", unix.Setns(self, unix.CLONE_NEWNET), unix.EPERM)
	r.want("setns of any kind", unix.Setns(self, 0), unix.EPERM)
	r.want("setns of another kind", unix.Setns(self, unix.CLONE_NEWUTS), unix.EINVAL, unix.EBADF)
	for what, kind := range map[string]uint16{"RTM_NEWADDR": unix.RTM_NEWADDR, "RTM_NEWLINK": unix.RTM_NEWLINK, "RTM_NEWROUTE": unix.RTM_NEWROUTE, "RTM_DELADDR": unix.RTM_DELADDR} {
		r.want(what, changeNetwork(kind), unix.EPERM)
	}
	return r
}

// changeNetwork asks for a change of the network and returns what gVisor answers.
func changeNetwork(kind uint16) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	message := make([]byte, unix.SizeofNlMsghdr+32)
	header := (*unix.NlMsghdr)(unsafe.Pointer(&message[0]))
	*header = unix.NlMsghdr{Len: uint32(len(message)), Type: kind, Flags: unix.NLM_F_REQUEST | unix.NLM_F_ACK | unix.NLM_F_CREATE, Seq: 1}
	if err := unix.Sendto(fd, message, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	answer := make([]byte, 4096)
	if n, err := unix.Read(fd, answer); err != nil || n < unix.SizeofNlMsghdr+4 {
		return err
	}
	if code := *(*int32)(unsafe.Pointer(&answer[unix.SizeofNlMsghdr])); code != 0 {
		return unix.Errno(-code)
	}
	return nil
}

// TestFilesAreNoWayOut mounts a folder of the host read-only in which a process of the host waits behind a socket and a
// FIFO, and a folder of this container's own that is writable.
func TestFilesAreNoWayOut(t *testing.T) {
	s := newSite(t)
	volume, own := t.TempDir(), filepath.Join(t.TempDir(), s.id, "shm")
	listener, err := net.Listen("unix", filepath.Join(volume, "socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	heard := receive(listener)
	fifo := filepath.Join(volume, "fifo")
	if err := unix.Mkfifo(fifo, 0o666); err != nil {
		t.Fatal(err)
	}
	reader, err := unix.Open(fifo, unix.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(reader)
	for _, err := range []error{os.WriteFile(filepath.Join(volume, "file"), []byte("as it was"), 0o666), os.MkdirAll(own, 0o777)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	s.change = func(spec map[string]any) {
		spec["mounts"] = []mount{
			{"/volume", "bind", volume, []string{"rbind", "ro"}}, {"/dev/shm", "bind", own, []string{"bind"}}, {"/proc", "proc", "proc", nil},
		}
	}

	got := s.ask("files")

	if got.Count < 15 {
		t.Errorf("only %d things were tried", got.Count)
	}
	if connections, bytes := heard.state(); connections != 0 || bytes != "" {
		t.Errorf("%d connections and %q arrived at the socket", connections, bytes)
	}
	if n, err := unix.Read(reader, make([]byte, 100)); n > 0 {
		t.Errorf("%d bytes arrived at the FIFO, %v", n, err)
	}
	entries, err := os.ReadDir(volume)
	if raw, _ := os.ReadFile(filepath.Join(volume, "file")); string(raw) != "as it was" || err != nil || len(entries) != 3 {
		t.Errorf("the volume has %d entries and %q, %v", len(entries), raw, err)
	}
	for _, entry := range []string{"socket", "fifo", "device"} {
		if info, err := os.Lstat(filepath.Join(own, entry)); err == nil && !info.Mode().IsRegular() {
			t.Errorf("the host sees %s, %v", entry, info.Mode())
		}
	}
}

func tryFiles() tried {
	var r tried
	connect := func(path string) error {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Connect(fd, &unix.SockaddrUnix{Name: path})
	}
	bind := func(path string) error {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Bind(fd, &unix.SockaddrUnix{Name: path})
	}
	write := func(path string, flags int) error {
		fd, err := unix.Open(path, unix.O_WRONLY|unix.O_NONBLOCK|flags, 0o666)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		_, err = unix.Write(fd, secret)
		return err
	}
	never := []error{unix.EROFS, unix.EPERM, unix.EACCES, unix.ECONNREFUSED, unix.ENXIO, unix.EOPNOTSUPP, unix.EINVAL}
	try := func(when string) {
		r.want("connect"+when, connect("/volume/socket"), never...)
		r.want("the FIFO"+when, write("/volume/fifo", 0), never...)
		r.want("the file"+when, write("/volume/file", 0), never...)
		r.want("another file"+when, write("/volume/other", unix.O_CREAT), never...)
		r.want("bind"+when, bind("/volume/bound"), never...)
		r.want("a FIFO"+when, unix.Mkfifo("/volume/made", 0o666), never...)
		r.want("a name"+when, unix.Rename("/volume/file", "/volume/renamed"), never...)
	}
	try("")
	unix.Mount("", "/volume", "", unix.MS_REMOUNT, "")
	unix.Mount("", "/volume", "", unix.MS_REMOUNT|unix.MS_BIND, "")
	// What has no file of the host behind it may be made now, in the Sentry's memory only.
	never = append(never, nil)
	try(", mounted again")
	if os.Mkdir("/tmp/second", 0o777) == nil && unix.Mount("/volume", "/tmp/second", "", unix.MS_BIND, "") == nil {
		r.want("a second mount", write("/tmp/second/file", 0), never...)
	}
	for _, kind := range []string{"9p", "gofer", "lisafs", "ext4", "nfs", "overlay", "fuse"} {
		r.want("mount "+kind, unix.Mount("x", "/tmp/second", kind, 0, "trans=fd,rfdno=0,wfdno=0"), unix.ENODEV, unix.EPERM, unix.EINVAL, unix.EACCES)
	}
	bind("/dev/shm/socket")
	unix.Mkfifo("/dev/shm/fifo", 0o666)
	unix.Mknod("/dev/shm/device", unix.S_IFCHR|0o666, int(unix.Mkdev(10, 200)))
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err == nil {
		_, err = unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_RDWR, 0)
	}
	r.want("a socket opened again", err, unix.ENXIO)
	targets, _ := os.ReadDir("/proc/self/fd")
	for _, entry := range targets {
		if to, _ := os.Readlink("/proc/self/fd/" + entry.Name()); strings.Contains(to, "guard") {
			r.Wrong = append(r.Wrong, "descriptor "+entry.Name()+" is "+to)
		}
	}
	return r
}

// hostNetwork is the namespace that this process began in. Tests move single threads to others, also the first one.
var hostNetwork, _ = os.Open("/proc/self/ns/net")

func TestTheNetworkOfTheHostIsRefused(t *testing.T) {
	for _, network := range []string{"sandbox", "host"} {
		s := newSite(t)
		s.change = func(spec map[string]any) {
			spec["linux"] = map[string]any{"namespaces": []map[string]string{{"type": "pid"}, {"type": "network", "path": fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), hostNetwork.Fd())}}}
		}
		s.configure("calls")
		command := exec.Command(s.runtime, "--root="+filepath.Join(s.folder, "state"), "--ignore-cgroups", "--network="+network, "run", "--bundle="+s.folder, s.id)

		if output, err := command.CombinedOutput(); err == nil || !strings.Contains(string(output), "network") {
			t.Errorf("--network=%s: %v: %s", network, err, output)
		}
	}
}
