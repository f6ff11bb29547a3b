//go:build sandbox

// Tests with real sandboxes: this test binary runs inside of one, as the function, while the test plays agent, gateway and
// the world. They need root and `ip`, and gcc for the comparison with stock gVisor:
//
//	CGO_ENABLED=0 go test -tags sandbox ./internal/sentry
package sentry

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/guard/guardtest"
)

const (
	outside   = guardtest.HostAddress // of the world's end of the cable
	sandboxIP = "10.137.0.10"
	patience  = 20 * time.Second
)

func TestMain(m *testing.M) {
	if scenario := os.Getenv("KALIUM_INSIDE"); scenario != "" {
		os.Exit(inside(scenario))
	}
	os.Exit(m.Run())
}

// site is one sandbox's surroundings: two network namespaces joined by a cable, a bundle, an agent.
type site struct {
	t       *testing.T
	folder  string
	world   string // the network namespace of everything but the sandbox
	id      string
	runtime string
	env     []string                  // of the function, besides the scenario
	change  func(spec map[string]any) // of the bundle, before it is started

	mu       sync.Mutex
	welcome  func(*frame.Hello) *frame.Welcome
	start    func(*frame.Start) *frame.Answer
	verdicts []frame.VerdictRecord
	ends     []frame.End
	hellos   []frame.Hello
	serving  int // connections of guards
}

func grant(m *frame.Start) *frame.Answer {
	answer, _ := guardtest.GrantStart(m)
	return answer
}

// lasting welcomes a guard with a lease that is longer than any test: nobody renews it here.
func lasting(t *testing.T, mode string) func(*frame.Hello) *frame.Welcome {
	return func(*frame.Hello) *frame.Welcome {
		welcome := guardtest.Welcome(t, mode)
		welcome.LeaseMS = 600000
		return welcome
	}
}

// built are the binaries that tests were run with; each is built once, unless KALIUM_BUILD names a folder that has it.
var built = map[string]func() (string, error){"runsc-kalium": building("runsc-kalium"), "runsc-stock": building("runsc-stock")}

func building(command string) func() (string, error) {
	return sync.OnceValues(func() (string, error) {
		if folder := os.Getenv("KALIUM_BUILD"); folder != "" {
			return filepath.Join(folder, command), nil
		}
		folder, err := os.MkdirTemp("", "kalium-sandbox-test")
		if err != nil {
			return "", err
		}
		path := filepath.Join(folder, command)
		build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", path, "kalium.dev/kalium/runtime/cmd/"+command)
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if output, err := build.CombinedOutput(); err != nil {
			return "", fmt.Errorf("go build: %w\n%s", err, output)
		}
		return path, nil
	})
}

func runtimePath(t *testing.T, command string) string {
	t.Helper()
	path, err := built[command]()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func shell(t *testing.T, line string) {
	t.Helper()
	words := strings.Fields(line)
	if output, err := exec.Command(words[0], words[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", line, err, output)
	}
}

// sites counts those that were made: each has names of its own.
var sites atomic.Int64

func newSite(t *testing.T) *site {
	t.Helper()
	number := fmt.Sprintf("%d-%d", os.Getpid(), sites.Add(1))
	s := &site{t: t, folder: t.TempDir(), world: "kalium-w" + number, id: "kalium-test-" + number, runtime: runtimePath(t, "runsc-kalium")}
	s.welcome = func(*frame.Hello) *frame.Welcome { return guardtest.Welcome(t, "enforce") }
	s.start = grant
	instance := "kalium-i" + number
	for _, name := range []string{s.world, instance} {
		shell(t, "ip netns add "+name)
		t.Cleanup(func() { exec.Command("ip", "netns", "del", name).Run() })
	}
	shell(t, "ip link add w0 netns "+s.world+" type veth peer name eth0 netns "+instance)
	shell(t, "ip -n "+s.world+" addr add "+outside+"/24 dev w0")
	shell(t, "ip -n "+s.world+" link set w0 up")
	shell(t, "ip -n "+instance+" addr add "+sandboxIP+"/24 dev eth0")
	shell(t, "ip -n "+instance+" link set eth0 up")
	shell(t, "ip -n "+instance+" link set lo up")
	s.bundle(instance)
	s.agent()
	return s
}

func (s *site) write(name string, content any) {
	s.t.Helper()
	raw, err := json.Marshal(content)
	if err == nil {
		err = os.WriteFile(filepath.Join(s.folder, name), raw, 0o600)
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) bundle(instance string) {
	s.t.Helper()
	root := filepath.Join(s.folder, "root")
	for _, folder := range []string{root, filepath.Join(root, "tmp"), filepath.Join(root, "proc")} {
		if err := os.MkdirAll(folder, 0o755); err != nil {
			s.t.Fatal(err)
		}
	}
	self, err := os.Executable()
	if err == nil {
		var raw []byte
		if raw, err = os.ReadFile(self); err == nil {
			err = os.WriteFile(filepath.Join(root, "inside"), raw, 0o755)
		}
	}
	if err != nil {
		s.t.Fatal(err)
	}
	s.write("pod-init.json", map[string]any{"trace_session": map[string]any{
		"name": "Default", "points": []any{map[string]any{"name": "container/start"}},
		"sinks": []any{map[string]any{"name": "kalium", "config": map[string]any{
			"endpoint": filepath.Join(s.folder, "guard.sock"), "operator_key": base64.StdEncoding.EncodeToString(guardtest.PublicKey),
		}}},
	}})
	s.write("spec.json", map[string]any{
		"ociVersion": "1.0.0", "annotations": map[string]string{annotationApp: guardtest.App, annotationFunction: guardtest.Function},
		"root": map[string]any{"path": root},
		"linux": map[string]any{"namespaces": []any{
			map[string]any{"type": "pid"}, map[string]any{"type": "mount"}, map[string]any{"type": "ipc"},
			map[string]any{"type": "network", "path": "/run/netns/" + instance},
		}},
	})
}

// agent answers the guard until the test is over.
func (s *site) agent() {
	s.t.Helper()
	listener, err := net.Listen("unix", filepath.Join(s.folder, "guard.sock"))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			s.mu.Lock()
			s.serving++
			s.mu.Unlock()
			go s.serve(conn)
		}
	}()
}

func (s *site) serve(conn net.Conn) {
	defer func() {
		conn.Close()
		s.mu.Lock()
		s.serving--
		s.mu.Unlock()
	}()
	var reader frame.Reader
	buffer := make([]byte, 64<<10)
	say := func(id uint32, m frame.Message) {
		b, err := frame.Append(nil, id, m)
		if err == nil {
			_, err = conn.Write(b)
		}
		if err != nil {
			s.t.Log("agent:", err)
		}
	}
	for {
		id, m, err := reader.Next()
		if err == frame.ErrShort {
			n, err := conn.Read(buffer)
			if err != nil {
				return
			}
			reader.Feed(buffer[:n])
			continue
		}
		if err != nil {
			s.t.Error("the guard said:", err)
			return
		}
		s.mu.Lock()
		switch m := m.(type) {
		case *frame.Hello:
			s.hellos = append(s.hellos, *m)
			say(id, s.welcome(m))
		case *frame.Start:
			say(id, s.start(m))
		case *frame.Verdict:
			s.verdicts = append(s.verdicts, m.Record)
		case *frame.End:
			s.ends = append(s.ends, *m)
		}
		s.mu.Unlock()
	}
}

// told waits until everything is read that the guard of a sandbox has said which has ended.
func (s *site) told() {
	s.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		s.mu.Lock()
		over := len(s.hellos) > 0 && s.serving == 0
		s.mu.Unlock()
		if over {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatal("the guard's connection does not end")
		}
	}
}

// denials lists the verdicts that deny, each kind and reason once.
func (s *site) denials() map[string]bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := map[string]bool{}
	for _, r := range s.verdicts {
		if !r.Allowed {
			list[r.Kind+" "+r.Reason] = true
		}
	}
	return list
}

// listen opens a listener in the world's network namespace.
func (s *site) listen(port int) net.Listener {
	s.t.Helper()
	var listener net.Listener
	s.there(func() (err error) {
		listener, err = net.Listen("tcp4", fmt.Sprintf("%s:%d", outside, port))
		return err
	})
	s.t.Cleanup(func() { listener.Close() })
	return listener
}

// there calls f on a thread that is in the world's network namespace. Sockets stay where they were made.
func (s *site) there(f func() error) {
	s.t.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		fd, err := unix.Open("/run/netns/"+s.world, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			if err = unix.Setns(fd, unix.CLONE_NEWNET); err == nil {
				err = f()
			}
			unix.Close(fd)
		}
		done <- err
	}()
	if err := <-done; err != nil {
		s.t.Fatal(err)
	}
}

// configure writes the bundle's config.json for a scenario.
func (s *site) configure(scenario string) {
	s.t.Helper()
	raw, err := os.ReadFile(filepath.Join(s.folder, "spec.json"))
	if err != nil {
		s.t.Fatal(err)
	}
	var spec map[string]any
	if err := json.Unmarshal(raw, &spec); err != nil {
		s.t.Fatal(err)
	}
	spec["process"] = map[string]any{
		"args": []string{"/inside"}, "cwd": "/", "env": append([]string{"KALIUM_INSIDE=" + scenario}, s.env...), "user": map[string]int{"uid": 0, "gid": 0},
		"capabilities": map[string][]string{
			"bounding": {"CAP_SYS_ADMIN", "CAP_NET_RAW"}, "effective": {"CAP_SYS_ADMIN", "CAP_NET_RAW"}, "permitted": {"CAP_SYS_ADMIN", "CAP_NET_RAW"},
		},
	}
	if s.change != nil {
		s.change(spec)
	}
	s.write("config.json", spec)
}

// run starts the sandbox with a scenario. wait returns what it printed.
func (s *site) run(scenario string, podInit bool) (wait func() string) {
	s.t.Helper()
	s.configure(scenario)
	args := []string{"--root=" + filepath.Join(s.folder, "state"), "--ignore-cgroups", "--network=sandbox", "--overlay2=root:memory"}
	if podInit {
		args = append(args, "--pod-init-config="+filepath.Join(s.folder, "pod-init.json"))
	}
	args = append(args, "run", "--bundle="+s.folder, s.id)
	cmd := exec.Command(s.runtime, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { cmd.Process.Kill() })
	return func() string {
		s.t.Helper()
		if err := cmd.Wait(); err != nil {
			s.t.Fatalf("%v\n%s%s", err, stdout.String(), stderr.String())
		}
		return stdout.String()
	}
}

// receiver counts connections and keeps bytes: the receiver's own evidence.
type receiver struct {
	mu          sync.Mutex
	connections int
	open        int
	got         []byte
}

func receive(listener net.Listener) *receiver {
	r := &receiver{}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			r.mu.Lock()
			r.connections++
			r.open++
			r.mu.Unlock()
			go func() {
				defer conn.Close()
				buffer := make([]byte, 64<<10)
				for {
					n, err := conn.Read(buffer)
					r.mu.Lock()
					r.got = append(r.got, buffer[:n]...)
					if err != nil {
						r.open--
					}
					r.mu.Unlock()
					if err != nil {
						return
					}
				}
			}()
		}
	}()
	return r
}

// settled returns what arrived once those connections have ended that were made, and no further one came: what was sent may be
// on its way when its sender says so. A connect that a signal has interrupted makes one that nobody counts, and that is empty.
func (r *receiver) settled(t *testing.T, made int) string {
	t.Helper()
	before := -1
	for deadline := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
		r.mu.Lock()
		connections, open, got := r.connections, r.open, string(r.got)
		r.mu.Unlock()
		if open == 0 && connections >= made && connections == before {
			return got
		}
		before = connections
		if time.Now().After(deadline) {
			t.Fatalf("%d connections came, %d are open, and %d were made", connections, open, made)
		}
	}
}

func (r *receiver) state() (int, string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.connections, string(r.got)
}

func TestSystemCallsThatLeadAroundTheGuardFailInside(t *testing.T) {
	s := newSite(t)

	var got map[string]string
	if err := json.Unmarshal([]byte(s.run("calls", true)()), &got); err != nil {
		t.Fatal(err)
	}

	for name, want := range map[string]string{
		"stream": "ok", "datagram": "ok", "unix": "ok", "netlink route": "ok", "unix pair": "ok", "loopback": "ok",
		"raw": "EPERM", "icmp": "EPROTONOSUPPORT", "packet": "EAFNOSUPPORT", "vsock": "EAFNOSUPPORT", "netlink netfilter": "EPROTONOSUPPORT",
		"internet pair": "EAFNOSUPPORT", "io_uring": "ENOSYS", "kernel tls": "ENOPROTOOPT", "bind to device": "ENOPROTOOPT", "multicast": "ENOPROTOOPT",
		"unshare": "EPERM", "clone": "EPERM", "clone3": "EPERM", "setns": "EPERM", "setns of any kind": "EPERM", "tun": "ENOTTY",
	} {
		if got[name] != want {
			t.Errorf("%s: %s, want %s", name, got[name], want)
		}
	}
}

func TestWithoutAGuardNothingLeaves(t *testing.T) {
	for name, change := range map[string]func(*site) (podInit bool){
		"no configuration": func(*site) bool { return false },
		"a refusal": func(s *site) bool {
			s.welcome = func(*frame.Hello) *frame.Welcome { return &frame.Welcome{Reason: "unregistered"} }
			return true
		},
		"a damaged policy": func(s *site) bool {
			s.welcome = func(*frame.Hello) *frame.Welcome {
				w := guardtest.Welcome(s.t, "audit")
				w.Policy = bytes.Replace(w.Policy, []byte(`"signature":"`), []byte(`"signature":"AAAA`), 1)
				return w
			}
			return true
		},
	} {
		s := newSite(t)
		r := receive(s.listen(8080))
		podInit := change(s)

		got := s.run("send", podInit)()

		if connections, bytes := r.state(); connections != 0 || bytes != "" || !strings.Contains(got, "connect: EPERM") {
			t.Errorf("%s: %d connections, %q arrived, the function said %s", name, connections, bytes, got)
		}
	}
}

func TestTheAgentHearsWhoTheSandboxIs(t *testing.T) {
	s := newSite(t)
	s.run("calls", true)()
	s.told()

	if len(s.hellos) != 1 || !reflect.DeepEqual(s.hellos[0], frame.Hello{Protos: frame.Protos(), Container: s.id, App: guardtest.App, Function: guardtest.Function}) {
		t.Errorf("hellos %+v", s.hellos)
	}
}

// request plays the gateway: it asks the function in the sandbox and returns the answer.
func (s *site) request(text string) string {
	s.t.Helper()
	deadline := time.Now().Add(patience)
	for {
		var conn net.Conn
		var failure error
		s.there(func() error {
			conn, failure = net.DialTimeout("tcp4", sandboxIP+":8080", time.Second)
			return nil
		})
		if failure == nil {
			defer conn.Close()
			conn.SetDeadline(deadline)
			if _, err := io.WriteString(conn, text); err != nil {
				s.t.Fatal(err)
			}
			answer, err := io.ReadAll(conn)
			if err != nil {
				s.t.Fatal(err)
			}
			return string(answer)
		}
		if time.Now().After(deadline) {
			s.t.Fatal(failure)
		}
		time.Sleep(20 * time.Millisecond) // until the function listens
	}
}

// tryWays has the function send the same message by each call that can send, and returns what it saw.
func (s *site) tryWays() map[string]string {
	s.t.Helper()
	wait := s.run("ways", true)
	answer := s.request(empty)
	wait()
	_, body, _ := strings.Cut(answer, "\r\n\r\n")
	var got map[string]string
	if err := json.Unmarshal([]byte(body), &got); err != nil {
		s.t.Fatalf("%v in %q", err, answer)
	}
	return got
}

const empty = "POST / HTTP/1.1\r\nHost: f\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"

func TestNoWayOfSendingLeavesAMessageUnjudged(t *testing.T) {
	s := newSite(t)
	r := receive(s.listen(8080))

	got := s.tryWays()

	for _, way := range ways {
		want := "EPERM"
		if way == "io_submit" {
			want = "ESPIPE" // gVisor takes it for a write at a position
		}
		if got[way] != want {
			t.Errorf("%s: %s", way, got[way])
		}
	}
	if _, bytes := r.state(); bytes != "" {
		t.Errorf("%q arrived", bytes)
	}
	s.told()
	if d := s.denials(); len(d) != 1 || !d["http not_in_policy"] {
		t.Errorf("denials %v", d)
	}
	if len(s.ends) != 1 || s.ends[0].Outcome != "answered" {
		t.Errorf("ends %+v", s.ends)
	}
}

func TestEachWayOfSendingArrivesOnceAndWholeWhereItPasses(t *testing.T) {
	s := newSite(t)
	s.welcome = func(*frame.Hello) *frame.Welcome { return guardtest.Welcome(t, "audit") }
	r := receive(s.listen(8080))

	got := s.tryWays()

	passed := 0
	for way, result := range got {
		if result == "ok" {
			passed++
		} else if way != "io_submit" {
			t.Errorf("%s: %s", way, result)
		}
	}
	deadline := time.Now().Add(patience)
	for {
		_, bytes := r.state()
		if bytes == strings.Repeat(string(secret), passed) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d bytes arrived of %d messages", len(bytes), passed)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestAStartThatIsRefusedIsNotSeenInside(t *testing.T) {
	s := newSite(t)
	s.start = func(*frame.Start) *frame.Answer { return &frame.Answer{Reason: "not_an_entry", Detail: "no"} }
	wait := s.run("count", true)

	refused := s.request(empty)
	s.mu.Lock()
	s.start = grant
	s.mu.Unlock()
	granted := s.request("POST / HTTP/1.1\r\nHost: f\r\nX-Kalium-Token: " + guardtest.Token + "\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
	wait()

	if !strings.HasPrefix(refused, "HTTP/1.1 403 ") || !strings.Contains(refused, "not_an_entry") {
		t.Errorf("refused: %q", refused)
	}
	if !strings.HasSuffix(granted, "request 1, token \"\"") {
		t.Errorf("granted: %q", granted)
	}
}

func TestWhatWasTakenIsSentAtTheEnd(t *testing.T) {
	s := newSite(t)
	s.welcome = func(*frame.Hello) *frame.Welcome { return guardtest.Welcome(t, "audit") }
	listener := s.listen(8080)
	received := make(chan int64, 1)
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		time.Sleep(300 * time.Millisecond) // a slow receiver: the program has ended before it reads
		n, err := io.Copy(io.Discard, conn)
		if err != nil {
			t.Error("the connection:", err)
		}
		received <- n
	}()

	if got := s.run("leave", true)(); !strings.Contains(got, "written: ok") {
		t.Fatal(got)
	}

	select {
	case n := <-received:
		if n != leavingBytes {
			t.Errorf("%d of %d bytes arrived", n, leavingBytes)
		}
	case <-time.After(patience):
		t.Error("the receiver waits in vain for the end")
	}
}
