package sentry

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/subcommands"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/runsc/cmd"
	"gvisor.dev/gvisor/runsc/config"
	"gvisor.dev/gvisor/runsc/flag"
)

// StartError says why the runtime does not do what it was asked.
type StartError struct{ Code, Attempted, Found, Next string }

// Error implements error in the form that every program of ours prints.
func (e *StartError) Error() string {
	return fmt.Sprintf("error[%s]: cannot %s: %s\nnext: %s", e.Code, e.Attempted, e.Found, e.Next)
}

func failed(code, attempted, found, next string) error {
	return &StartError{Code: code, Attempted: attempted, Found: found, Next: next}
}

// allowedCommands are those of runsc that a container engine needs. restore is not among them, since an image may bring
// sockets that are not guarded, nor is port-forward, which makes connections that look like the sandbox's own.
var allowedCommands = []string{
	"create", "run", "start", "delete", "kill", "state", "list", "ps", "events", "exec", "wait", "pause", "resume",
	"spec", "update", "help", "flags", "boot", "gofer", "umount",
}

// flagRule says which values of a flag of runsc a guarded sandbox may have.
type flagRule struct {
	name    string
	allowed []string
	why     string
}

var flagRules = []flagRule{
	{"network", []string{"sandbox", "none"}, "sockets of the host's network have no endpoint that could be guarded"},
	{"host-uds", []string{"none"}, "the host's sockets lead out of the sandbox"},
	{"fsgofer-host-uds", []string{"false"}, "the host's sockets lead out of the sandbox"},
	{"host-fifo", []string{"none"}, "the host's FIFOs lead out of the sandbox"},
	{"net-raw", []string{"false"}, "raw sockets write packets past the endpoint"},
	{"allow-packet-socket-write", []string{"false"}, "packet sockets write packets past the endpoint"},
	{"allow-flag-override", []string{"false"}, "annotations could undo these rules"},
	{"iouring", []string{"false"}, "io_uring sends without system calls"},
	{"reproduce-nat", []string{"false"}, "address translation could lead loopback traffic out"},
	{"reproduce-nftables", []string{"false"}, "address translation could lead loopback traffic out"},
	{"TESTONLY-nftables", []string{"false"}, "address translation could lead loopback traffic out"},
	{"EXPERIMENTAL-xdp", []string{"off"}, "tunnels of the host's interfaces are not looked at"},
	{"nvproxy", []string{"false"}, "devices of the host are not looked at"},
	{"tpuproxy", []string{"false"}, "devices of the host are not looked at"},
	{"TESTONLY-unsafe-nonroot", []string{"false"}, "it leaves out parts of the isolation"},
	{"TESTONLY-autosave-image-path", []string{""}, "checkpoints of guarded sockets do not work"},
}

// allowedAnnotations are those of gVisor's own that a bundle may carry. The others change flags, share volumes between
// containers or bring files of the host in.
var allowedAnnotations = []string{"dev.gvisor.internal.seccomp.", "dev.gvisor.spec.cgroup-parent"}

// refusedCapabilities would let a program change routes, addresses and filters, or write packets itself. runsc takes
// CAP_NET_RAW away without being asked.
var refusedCapabilities = []string{"CAP_NET_ADMIN"}

// command is what this process was started to do.
type command struct {
	name  string
	flags *flag.FlagSet // of runsc
	own   *flag.FlagSet // of the command
	id    string
	spec  *bundleSpec // for create, run and boot
}

// started is the command of this process, once Examine has let it pass.
var started *command

// bundleSpec is the part of an OCI config.json that concerns us.
type bundleSpec struct {
	Annotations map[string]string `json:"annotations"`
	Process     *process          `json:"process"`
	Mounts      []mount           `json:"mounts"`
	Linux       struct {
		Devices []device `json:"devices"`
	} `json:"linux"`
}

type process struct {
	Capabilities map[string][]string `json:"capabilities"`
}

// Examine reads a command line of runsc, args[0] being the first argument, and refuses what would lead around the
// guard. It reads with gVisor's own definitions of flags, so that both understand the same.
func Examine(args []string) error {
	c, err := parse(args)
	if err != nil || c == nil {
		return err
	}
	if !slices.Contains(allowedCommands, c.name) {
		return failed("runtime.command", "do "+c.name, "a command that a guarded sandbox does not offer", "use "+strings.Join(allowedCommands[:12], ", "))
	}
	switch c.name {
	case "create", "run", "boot":
		if err := c.readSpec(); err != nil {
			return err
		}
		if err := c.checkFlags(); err != nil {
			return err
		}
		if err := c.checkSpec(); err != nil {
			return err
		}
	case "exec":
		if err := c.checkExec(); err != nil {
			return err
		}
	}
	if err := c.checkDescriptors(); err != nil {
		return err
	}
	if c.name == "create" || c.name == "run" {
		if err := c.prepareBundle(); err != nil {
			return err
		}
	}
	started = c
	return nil
}

// Report says why a command is refused: to standard error, and in the log by which container engines hear of errors.
func Report(args []string, refusal error) {
	fmt.Fprintln(os.Stderr, refusal)
	c, err := parse(args)
	if err != nil || c == nil || c.flags.Lookup("log").Value.String() == "" {
		return
	}
	line, err := json.Marshal(map[string]string{"level": "error", "msg": refusal.Error(), "time": time.Now().Format(time.RFC3339Nano)})
	if err != nil {
		return // texts of ours always are JSON
	}
	file, err := os.OpenFile(c.flags.Lookup("log").Value.String(), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err == nil {
		_, err = file.Write(append(line, '\n'))
		err = errors.Join(err, file.Close())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
}

// parse returns nil for a command line without a command, like --version, and for one that runsc will refuse itself.
func parse(args []string) (*command, error) {
	c := &command{flags: flag.NewFlagSet("runsc-kalium", flag.ContinueOnError)}
	c.flags.SetOutput(io.Discard)
	config.RegisterFlags(c.flags)
	// Defined by runsc's command line package for itself.
	for _, name := range []string{"log-fd", "debug-log-fd", "panic-log-fd", "coverage-fd"} {
		c.flags.Int(name, -1, "")
	}
	for _, name := range []string{"help", "h", "version"} {
		if c.flags.Lookup(name) == nil {
			c.flags.Bool(name, false, "")
		}
	}
	if err := c.flags.Parse(args); err != nil {
		return nil, failed("runtime.flags", "read the command line", err.Error(), "see `runsc-kalium flags`")
	}
	if c.flags.NArg() == 0 {
		return nil, nil
	}
	c.name = c.flags.Arg(0)
	definitions := map[string]subcommands.Command{"create": new(cmd.Create), "run": new(cmd.Run), "boot": new(cmd.Boot), "exec": new(cmd.Exec)}
	definition, found := definitions[c.name]
	if !found {
		return c, nil
	}
	c.own = flag.NewFlagSet(c.name, flag.ContinueOnError)
	c.own.SetOutput(io.Discard)
	definition.SetFlags(c.own)
	if err := c.own.Parse(c.flags.Args()[1:]); err != nil {
		return nil, failed("runtime.flags", "read the flags of "+c.name, err.Error(), "see `runsc-kalium help "+c.name+"`")
	}
	c.id = c.own.Arg(0)
	return c, nil
}

func (c *command) value(name string) string {
	f := c.own.Lookup(name)
	if f == nil {
		return ""
	}
	return f.Value.String()
}

func (c *command) readSpec() error {
	var raw []byte
	var err error
	from := "the bundle's config.json"
	if c.name == "boot" {
		raw, err = readDescriptor(c.value("spec-fd"))
	} else {
		from = filepath.Join(c.value("bundle"), "config.json")
		raw, err = os.ReadFile(from)
	}
	if err != nil {
		return failed("runtime.bundle", "read "+from, err.Error(), "give the bundle's folder with --bundle")
	}
	c.spec = &bundleSpec{}
	if err := json.Unmarshal(raw, c.spec); err != nil {
		return failed("runtime.bundle", "read "+from, err.Error(), "make the bundle again")
	}
	return nil
}

// specBytesMax is far above what container engines write.
const specBytesMax = 16 << 20

// readDescriptor reads a file from its beginning and leaves the descriptor's position alone: gVisor reads it, too.
func readDescriptor(number string) ([]byte, error) {
	fd, err := strconv.Atoi(number)
	if err != nil || fd < 0 {
		return nil, fmt.Errorf("descriptor %q", number)
	}
	var raw []byte
	buffer := make([]byte, 64<<10)
	for {
		n := 0
		err := again(func() (err error) { n, err = unix.Pread(fd, buffer, int64(len(raw))); return err })
		if err != nil {
			return nil, fmt.Errorf("pread(%d): %w", fd, err)
		}
		if n == 0 {
			return raw, nil
		}
		if raw = append(raw, buffer[:n]...); len(raw) > specBytesMax {
			return nil, fmt.Errorf("more than %d bytes", specBytesMax)
		}
	}
}

func (c *command) checkFlags() error {
	for _, rule := range flagRules {
		f := c.flags.Lookup(rule.name)
		if f == nil {
			return failed("runtime.flags", "check flag --"+rule.name, "this gVisor has no such flag", "report it: the rules and the linked gVisor disagree")
		}
		if value := f.Value.String(); !slices.Contains(rule.allowed, value) {
			return failed("runtime.flags", c.name+" a guarded sandbox", fmt.Sprintf("--%s=%s: %s", rule.name, value, rule.why),
				"leave the flag out")
		}
	}
	return nil
}

func (c *command) checkSpec() error {
	for name, value := range c.spec.Annotations {
		if !strings.HasPrefix(name, "dev.gvisor.") || c.isSharedMemory(name, value) {
			continue
		}
		if !slices.ContainsFunc(allowedAnnotations, func(prefix string) bool { return strings.HasPrefix(name, prefix) }) {
			return failed("runtime.annotations", c.name+" a guarded sandbox", "annotation "+strconv.Quote(name)+", which changes how gVisor isolates it",
				"remove the annotation")
		}
	}
	for _, check := range []func() error{c.checkRoot, c.checkMounts, c.checkDevices, c.checkPod} {
		if err := check(); err != nil {
			return err
		}
	}
	return c.spec.Process.check(c.name)
}

func (p *process) check(name string) error {
	if p == nil {
		return nil
	}
	for set, capabilities := range p.Capabilities {
		for _, capability := range capabilities {
			if slices.Contains(refusedCapabilities, capability) {
				return failed("runtime.capabilities", name+" in a guarded sandbox", capability+" in the "+set+" set", "drop the capability")
			}
		}
	}
	return nil
}

func (c *command) checkExec() error {
	for _, capability := range refusedCapabilities {
		if strings.Contains(c.value("cap"), capability) { // the flag's text is a list in Go's own form
			return failed("runtime.capabilities", "exec in a guarded sandbox", "--cap "+capability, "drop the capability")
		}
	}
	path := c.value("process")
	if path == "" {
		return nil
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		return failed("runtime.exec", "read "+path, err.Error(), "give the process description with --process")
	}
	described := &process{}
	if err := json.Unmarshal(raw, described); err != nil {
		return failed("runtime.exec", "read "+path, err.Error(), "write it as the OCI runtime specification says")
	}
	return described.check("exec")
}

// checkDescriptors refuses files of the host that are passed in: one of them may be a connection.
func (c *command) checkDescriptors() error {
	if c.own == nil {
		return nil
	}
	given := ""
	c.own.Visit(func(f *flag.Flag) {
		if f.Name == "pass-fd" || f.Name == "exec-fd" && f.Value.String() != "-1" {
			given = f.Name
		}
	})
	if given != "" {
		return failed("runtime.flags", c.name+" in a guarded sandbox", "--"+given+" passes a descriptor of the host", "leave the flag out")
	}
	return nil
}
