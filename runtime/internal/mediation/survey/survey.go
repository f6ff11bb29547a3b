// Package survey lists what the linked gVisor offers that could send bytes, from its own tables and from the source that
// is compiled into the runtime. What it lists has to have a line in package mediation.
package survey

import (
	"flag"
	"fmt"
	"go/ast"
	"io"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/google/subcommands"
	"gvisor.dev/gvisor/pkg/sentry/kernel"
	"gvisor.dev/gvisor/pkg/sentry/syscalls/linux"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/runsc/cmd"
	"gvisor.dev/gvisor/runsc/config"
	gvisorflag "gvisor.dev/gvisor/runsc/flag"

	"kalium.dev/kalium/runtime/internal/mediation"
)

// Survey is what there is: for each kind of package mediation the sorted names.
type Survey map[mediation.Kind][]string

// proxies hand devices of the host through. The flags that start them are refused, and their ioctls are not looked at.
var proxies = []string{"pkg/sentry/devices/nvproxy", "pkg/sentry/devices/tpuproxy"}

// Take looks at everything.
func Take() (Survey, error) {
	packages, err := linked()
	if err != nil {
		return nil, err
	}
	s := Survey{}
	for _, table := range []*kernel.SyscallTable{linux.AMD64, linux.ARM64} {
		for _, call := range table.Table {
			s.add(mediation.Calls, call.Name)
		}
	}
	endpoint := reflect.TypeFor[tcpip.Endpoint]()
	for i := range endpoint.NumMethod() {
		s.add(mediation.Methods, endpoint.Method(i).Name)
	}
	s.flags()
	for i := range packages {
		s.source(&packages[i])
	}
	for kind, names := range s {
		slices.Sort(names)
		s[kind] = slices.Compact(names)
	}
	return s, nil
}

// Unclassified lists what has no line.
func (s Survey) Unclassified() []string {
	var missing []string
	for _, kind := range mediation.Kinds() {
		for _, name := range s[kind] {
			if _, found := mediation.Of(kind, name); !found {
				missing = append(missing, fmt.Sprintf("%s: %s", kind, name))
			}
		}
	}
	return missing
}

// Leftover lists lines of things that the linked gVisor does not have.
func (s Survey) Leftover() []string {
	var extra []string
	for _, kind := range mediation.Kinds() {
		for _, line := range mediation.Lines(kind) {
			if _, surveyed := s[kind]; surveyed && !line.Unlisted && !slices.Contains(s[kind], line.Name) {
				extra = append(extra, fmt.Sprintf("%s: %s", kind, line.Name))
			}
		}
	}
	return extra
}

func (s Survey) add(kind mediation.Kind, names ...string) { s[kind] = append(s[kind], names...) }

// flags lists the flags of runsc and of those commands that have a guarded sandbox.
func (s Survey) flags() {
	every := func(prefix string, define func(*gvisorflag.FlagSet)) {
		set := gvisorflag.NewFlagSet(prefix, flag.ContinueOnError)
		set.SetOutput(io.Discard)
		define(set)
		set.VisitAll(func(f *flag.Flag) { s.add(mediation.Flags, prefix+"--"+f.Name) })
	}
	every("", config.RegisterFlags)
	for name, command := range map[string]subcommands.Command{"create": new(cmd.Create), "run": new(cmd.Run), "exec": new(cmd.Exec)} {
		every(name+" ", command.SetFlags)
	}
}

// optionLevels are the functions of gVisor that take socket options, and whose they are.
var optionLevels = map[string]string{
	"SetSockOptSocket": "SOL_SOCKET", "setSockOptTCP": "SOL_TCP", "setSockOptICMPv6": "SOL_ICMPV6",
	"setSockOptIPv6": "SOL_IPV6", "setSockOptIP": "SOL_IP", "setSockOptPacket": "SOL_PACKET",
}

// source lists what one package offers.
func (s Survey) source(c *code) {
	if slices.ContainsFunc(proxies, func(prefix string) bool { return strings.HasPrefix(c.path, prefix) }) {
		s.add(mediation.Devices, c.path)
		return
	}
	c.functions(func(f *ast.FuncDecl) {
		name := f.Name.Name
		switch {
		case strings.EqualFold(name, "ioctl") || strings.HasSuffix(name, "Ioctl"):
			for _, n := range cases(f) {
				if !strings.HasPrefix(n, "AF_") && !strings.HasPrefix(n, "F_OWNER_") {
					s.add(mediation.Ioctls, n)
				}
			}
		case c.path == "pkg/sentry/socket/netstack" && optionLevels[name] != "":
			for _, option := range cases(f) {
				if isOption(option) {
					s.add(mediation.Options, optionLevels[name]+" "+option)
				}
			}
		case c.path == "pkg/sentry/socket/netlink" && name == "SetSockOpt":
			for _, option := range cases(f) {
				if strings.HasPrefix(option, "NETLINK_") {
					s.add(mediation.Options, "SOL_NETLINK "+option)
				}
			}
		case c.path == "pkg/sentry/syscalls/linux" && strings.Contains(strings.ToLower(name), "send"):
			s.add(mediation.MessageFlags, mentioned(f, "MSG_")...)
		case c.path == "pkg/sentry/socket/netstack" && name == "getTransportProtocol":
			s.add(mediation.Transports, transports(f)...)
		}
		if returnsEndpoint(f) {
			s.add(mediation.Makers, c.path+" "+nameOf(f))
		}
		s.calls(c, f)
	})
	for _, file := range c.files {
		s.literals(c, file)
	}
}

func isOption(name string) bool {
	return !strings.HasPrefix(name, "SOCK_") && !strings.HasPrefix(name, "AF_") && !strings.HasPrefix(name, "IP_PMTUDISC_") && !strings.HasPrefix(name, "TPACKET_") && !strings.HasPrefix(name, "CAP_")
}

// calls lists what a function registers and which endpoints it makes.
func (s Survey) calls(c *code, f *ast.FuncDecl) {
	ast.Inspect(f.Body, func(n ast.Node) bool {
		call, ok := n.(*ast.CallExpr)
		if !ok {
			return true
		}
		switch name := called(call); name {
		case "RegisterProvider":
			if c.path == "pkg/sentry/socket/netlink" && f.Name.Name != "init" {
				return true
			}
			families := append(mentioned(f, "AF_"), mentioned(f, "NETLINK_")...)
			if len(families) == 0 { // the families are in a variable of the package
				c.variables(func(d *ast.GenDecl) { families = append(families, mentioned(d, "AF_")...) })
			}
			if len(families) == 0 {
				s.add(mediation.Providers, c.path)
			}
			for _, family := range families {
				s.add(mediation.Providers, c.path+" "+family)
			}
		case "NewEndpoint", "NewRawEndpoint", "NewPacketEndpoint", "NewUnassociatedEndpoint", "CreateEndpoint":
			s.add(mediation.Makers, c.path+" "+nameOf(f)+" calls "+name)
		case "MustRegisterFilesystemType", "RegisterFilesystemType":
			if len(call.Args) > 1 && text(call.Args[0]) != "name" { // not the function that registers by another one
				s.add(mediation.Filesystems, text(call.Args[0]))
			}
		case "RegisterDevice":
			s.add(mediation.Devices, c.path)
		case "new":
			if c.path == "runsc/cli/maincli" && len(call.Args) == 1 {
				s.add(mediation.Commands, strings.ToLower(called(&ast.CallExpr{Fun: call.Args[0]})))
			}
		}
		return true
	})
}

// transports pairs the socket types with the protocols that gVisor has an endpoint for.
func transports(f *ast.FuncDecl) []string {
	var pairs []string
	ast.Inspect(f.Body, func(n ast.Node) bool {
		outer, ok := n.(*ast.CaseClause)
		if !ok {
			return true
		}
		for _, e := range outer.List {
			kind := selected(e)
			if !strings.HasPrefix(kind, "SOCK_") {
				continue
			}
			for _, statement := range outer.Body {
				for _, protocol := range mentioned(statement, "IPPROTO_") {
					pairs = append(pairs, kind+" "+protocol)
				}
			}
		}
		return true
	})
	return pairs
}

// returnsEndpoint tells a function that gives a transport endpoint away.
func returnsEndpoint(f *ast.FuncDecl) bool {
	if f.Type.Results == nil {
		return false
	}
	return slices.ContainsFunc(f.Type.Results.List, func(r *ast.Field) bool { return text(r.Type) == "tcpip.Endpoint" })
}

// literals lists transport protocols of the sandbox's stack, and annotations.
func (s Survey) literals(c *code, file *ast.File) {
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.CompositeLit:
			array, ok := n.Type.(*ast.ArrayType)
			if ok && text(array.Elt) == "stack.TransportProtocolFactory" {
				for _, e := range n.Elts {
					s.add(mediation.Factories, c.path+" "+text(e))
				}
			}
		case *ast.BasicLit:
			if value, err := strconv.Unquote(n.Value); err == nil && strings.HasPrefix(value, "dev.gvisor.") {
				s.add(mediation.Annotations, value)
			}
		}
		return true
	})
}

// text spells a qualified name or a string.
func text(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.SelectorExpr:
		return text(e.X) + "." + e.Sel.Name
	case *ast.Ident:
		return e.Name
	case *ast.StarExpr:
		return "*" + text(e.X)
	case *ast.BasicLit:
		return e.Value
	}
	return "?"
}
