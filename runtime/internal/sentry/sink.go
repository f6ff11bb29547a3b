package sentry

import (
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/fd"
	"gvisor.dev/gvisor/pkg/log"
	"gvisor.dev/gvisor/pkg/sentry/seccheck"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/guard"
)

const (
	sinkName    = "kalium"
	helloID     = 1
	welcomeWait = 5 * time.Second // for the agent's answer, while nothing of the sandbox runs

	// The agent of a cluster's node holds a hello until its pod is registered, for admit_wait_ms, which is 30 s at most.
	admitWait    = 35 * time.Second
	refusalBytes = 4096 // more than a refusal has: a longer answer is a welcome

	annotationApp      = "kalium.io/app"
	annotationFunction = "kalium.io/function"
	annotationTimers   = "kalium.io/timers"
)

// installed is the guard of this sandbox. It stays nil when there is none, and a nil guard denies.
var installed atomic.Pointer[guard.Guard]

// Register makes the sink known. gVisor calls its Setup in the host-side process, before the sandbox exists, and its New
// in the Sentry, before the system call filters are set. When either fails and the container runs nevertheless, there is
// no guard, and every message is denied.
func Register() {
	seccheck.RegisterSink(seccheck.SinkDesc{Name: sinkName, Setup: setup, New: newSink})
}

// setup connects to the agent and says who this sandbox is. Nothing that runs in the sandbox can forge that.
func setup(config map[string]any) (*os.File, error) {
	path, err := text(config, "endpoint")
	if err != nil {
		return nil, err
	}
	if _, err := operatorKey(config); err != nil {
		return nil, err
	}
	hello, err := identify()
	if err != nil {
		return nil, err
	}
	b, err := frame.Append(nil, helloID, hello)
	if err != nil {
		return nil, failed("runtime.hello", "say who the sandbox is", err.Error(), "check the kalium.io annotations of the bundle")
	}
	socket, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	file := os.NewFile(uintptr(socket), path)
	limit := unix.NsecToTimeval(welcomeWait.Nanoseconds())
	err = errors.Join(
		unix.SetsockoptTimeval(socket, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit),
		unix.SetsockoptTimeval(socket, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit),
	)
	if err == nil {
		err = again(func() error { return unix.Connect(socket, &unix.SockaddrUnix{Name: path}) })
	}
	if err == nil {
		_, err = connection(socket).Write(b)
	}
	if err != nil {
		file.Close()
		return nil, failed("runtime.agent", "reach the agent at "+path, err.Error(), "start kalium-agent, or check `endpoint` in the pod-init configuration")
	}
	if started.isPodSandbox() {
		if err := awaitAdmission(socket, hello); err != nil {
			file.Close()
			return nil, err
		}
	}
	return file, nil
}

// awaitAdmission waits for the agent's answer and leaves it where it is: the Sentry reads and judges it. A pod that is refused
// here does not start, so the kubelet says why and tries again, instead of keeping a sandbox that can send nothing.
func awaitAdmission(socket int, hello *frame.Hello) error {
	refuse := func(found string) error {
		return failed("runtime.refused", fmt.Sprintf("start pod %s as function %s of app %s", hello.Container, hello.Function, hello.App), found,
			"see the log of kalium-registrar, which registers admitted pods, and the agent's on this node")
	}
	limit := unix.NsecToTimeval(admitWait.Nanoseconds())
	buffer := make([]byte, refusalBytes)
	n := 0
	err := unix.SetsockoptTimeval(socket, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit)
	if err == nil {
		err = again(func() (err error) { n, _, err = unix.Recvfrom(socket, buffer, unix.MSG_PEEK); return err })
	}
	if err != nil {
		return refuse("no answer of the agent: " + err.Error())
	}
	if n == 0 {
		return refuse("the agent closed the connection")
	}
	// What is not whole in the first piece is longer than a refusal.
	_, m, _, err := frame.Decode(buffer[:n])
	if welcome, ok := m.(*frame.Welcome); err == nil && ok && !welcome.OK {
		return refuse("the agent's answer is " + welcome.Reason)
	}
	limit = unix.NsecToTimeval(welcomeWait.Nanoseconds())
	if err := unix.SetsockoptTimeval(socket, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit); err != nil {
		return refuse(err.Error())
	}
	return nil
}

// identify says who this process was started for, by the command line and the bundle that gVisor itself works with.
func identify() (*frame.Hello, error) {
	if started == nil || started.spec == nil {
		return nil, failed("runtime.start", "say who the sandbox is", "a command that starts none", "use create or run")
	}
	hello := &frame.Hello{
		Protos: frame.Protos(), Container: started.instance(),
		App: started.spec.Annotations[annotationApp], Function: started.spec.Annotations[annotationFunction],
	}
	if hello.App == "" || hello.Function == "" {
		return nil, failed("runtime.annotations", "start container "+started.id, "a bundle without "+annotationApp+" or "+annotationFunction,
			"deploy the function through the gateway, which sets both")
	}
	return hello, nil
}

func text(config map[string]any, name string) (string, error) {
	value, _ := config[name].(string)
	if value == "" {
		return "", failed("runtime.pod_init", "read the pod-init configuration", "no text `"+name+"` for sink "+sinkName,
			"write it as runtime/README.md shows")
	}
	return value, nil
}

func operatorKey(config map[string]any) (ed25519.PublicKey, error) {
	encoded, err := text(config, "operator_key")
	if err != nil {
		return nil, err
	}
	key, err := base64.StdEncoding.Strict().DecodeString(encoded)
	if err != nil || len(key) != ed25519.PublicKeySize {
		return nil, failed("runtime.pod_init", "read the pod-init configuration", "an `operator_key` that is not base64 of 32 bytes",
			"put the raw public key of the operator there")
	}
	return key, nil
}

// sink is what stays of the event mechanism: nothing is asked of it.
type sink struct{ seccheck.SinkDefaults }

// Name implements seccheck.Sink.
func (sink) Name() string { return sinkName }

// newSink reads the agent's Welcome from the donated descriptor and puts the guard in force.
func newSink(config map[string]any, donated *fd.FD) (seccheck.Sink, error) {
	if installed.Load() != nil {
		return nil, errors.New("there is a guard already")
	}
	if donated == nil {
		return nil, errors.New("no connection to the agent was donated")
	}
	// gVisor closes nothing of it again, so the number stays ours.
	conn := connection(donated.Release())
	if err := welcome(config, conn); err != nil {
		conn.Close()
		log.Warningf("kalium: no guard, so everything is denied: %v", err)
		return nil, err
	}
	return sink{}, nil
}

func welcome(config map[string]any, conn connection) error {
	key, err := operatorKey(config)
	if err != nil {
		return err
	}
	hello, err := identify()
	if err != nil {
		return err
	}
	reader := &frame.Reader{}
	message, err := first(reader, conn)
	if err != nil {
		return fmt.Errorf("the agent's welcome: %w", err)
	}
	// From here on waiting has other bounds: questions have deadlines of their own, and reads wait for news.
	forever := unix.Timeval{}
	err = errors.Join(
		unix.SetsockoptTimeval(int(conn), unix.SOL_SOCKET, unix.SO_RCVTIMEO, &forever),
		unix.SetsockoptTimeval(int(conn), unix.SOL_SOCKET, unix.SO_SNDTIMEO, &forever),
	)
	if err != nil {
		return fmt.Errorf("setsockopt: %w", err)
	}
	link := guard.NewLink(conn, helloID, func(r *frame.VerdictRecord) {
		log.Warningf("kalium: verdict without an agent: %+v", *r)
	})
	identity := guard.Identity{Container: hello.Container, App: hello.App, Function: hello.Function, Trusting: wantsTrust(started)}
	g, err := guard.New(identity, key, message, link)
	if err != nil {
		return err
	}
	if started.spec.Annotations[annotationTimers] == "on" {
		g.StartTimers(link)
	}
	link.Serve(reader, g, func(why string) { log.Warningf("kalium: agent: %s", why) })
	installed.Store(g)
	return nil
}

func first(reader *frame.Reader, conn connection) (*frame.Welcome, error) {
	deadline := time.Now().Add(welcomeWait)
	buffer := make([]byte, 64<<10)
	for {
		id, m, err := reader.Next()
		if err == nil {
			welcome, ok := m.(*frame.Welcome)
			if !ok || id != helloID {
				return nil, fmt.Errorf("message of type %d with id %d came first", m.Type(), id)
			}
			return welcome, nil
		}
		if err != frame.ErrShort {
			return nil, err
		}
		if time.Now().After(deadline) {
			return nil, errors.New("it did not come in time")
		}
		n, err := conn.Read(buffer)
		if err != nil {
			return nil, err
		}
		if n == 0 {
			return nil, errors.New("the agent closed the connection")
		}
		reader.Feed(buffer[:n])
	}
}
