package mediation

import (
	"fmt"
	"strings"
)

// about says of each kind where its names come from and how its lines are kept.
var about = map[Kind]string{
	Calls:        "From gVisor's own tables for amd64 and arm64. A call without a line is refused when it is called.",
	Sockets:      "What `socket(2)` is asked for. One without a line is refused: families with `EAFNOSUPPORT`, raw sockets with `EPERM`, other protocols with `EPROTONOSUPPORT`. `socketpair(2)` makes AF_UNIX only.",
	Transports:   "From gVisor's `getTransportProtocol`: each type and protocol that it has an endpoint for.",
	Providers:    "From each call of `RegisterProvider` in the packages that the runtime links.",
	Factories:    "From the options of the sandbox's network stack.",
	Makers:       "Each function of the linked packages that returns a `tcpip.Endpoint`, and each call of one.",
	Methods:      "From `tcpip.Endpoint` by reflection. The wrapper names every method, so a new one does not even compile.",
	Options:      "From the functions of gVisor that take options. One without a line is refused with `ENOPROTOOPT`; gVisor itself takes most without doing anything.",
	MessageFlags: "From gVisor's `sendto`, `sendmsg` and `sendmmsg`, and those of Linux beside.",
	Ioctls:       "From every `Ioctl` of the linked packages. One without a line is refused with `ENOTTY`.",
	Commands:     "From the command line of runsc. One without a line is refused.",
	Flags:        "From the flag sets of runsc and of its commands `create`, `run` and `exec`.",
	Annotations:  "From the source of the linked packages. Of those that begin with `dev.gvisor.` only the harmless ones are let pass.",
	Filesystems:  "From each call of `RegisterFilesystemType`.",
	Devices:      "From each call of `RegisterDevice`, and the packages that hand devices of the host through.",
	Starts:       "What the bundle of a container and the engine give a sandbox.",
	Files:        "What no list of gVisor's shows.",
	Traffic:      "What no list of gVisor's shows.",
}

// Document writes the table as docs/reference/mediation.md.
func Document() string {
	var b strings.Builder
	b.WriteString(`# Ways out of a sandbox

Everything in the linked gVisor by which bytes could leave a sandbox, and how it is closed. This page is generated:

    cd runtime && go run ./internal/mediation/document > ../docs/reference/mediation.md

The table is ` + "`runtime/internal/mediation`" + `. A test compares it with what gVisor offers, in its own tables and in the source
that is compiled into the runtime, and fails when something has no line: an upgrade of gVisor cannot open a way silently.
` + "`go run ./internal/mediation/document -unclassified`" + ` prints how many have none.

| class | meaning |
|---|---|
| ends at the endpoint | for internet sockets it ends in a method of the guarded endpoint, which reads the bytes once, has them judged and sends that copy |
| by argument | some uses are refused, by the arguments alone; no descriptor is looked up for it |
| refused | does not work in a guarded sandbox, or keeps it from starting |
| harmless | touches nothing outside of the sandbox |
| absent | this gVisor answers with an error; a later one that has it fails the test |

gVisor's own tests of system calls are C++ programs that are built with Bazel. They are no part of its Go module and were not
run. In their place stands ` + "`runtime/internal/sentry/semantics_test.go::TestAProgramSeesTheSocketsOfStockGVisor`" + `, which compares line by
line what a program sees of sockets under stock gVisor and under ours: 170 checks on loopback (off, audit, enforce), 150 to outside
(off, audit). What the table refuses of options and ioctls differs from stock by design and is not among them.
`)
	counts := map[Class]int{}
	for _, kind := range Kinds() {
		for _, line := range Lines(kind) {
			counts[line.Class]++
		}
	}
	fmt.Fprintf(&b, "\nLines: %d refused, %d by argument, %d at the endpoint, %d harmless, %d absent.\n",
		counts[Refused], counts[Replaced], counts[EndsAtEndpoint], counts[Inside], counts[Absent])
	numbers := map[string]int{}
	var shown []string
	for _, kind := range Kinds() {
		lines := Lines(kind)
		title := strings.ToUpper(string(kind[:1])) + string(kind[1:])
		fmt.Fprintf(&b, "\n## %s\n\n%s %d lines.\n\n| name | how bytes could leave | class | note | test |\n|---|---|---|---|---|\n", title, about[kind], len(lines))
		for _, line := range lines {
			test := TestOf(kind, line)
			if numbers[test] == 0 {
				shown = append(shown, test)
				numbers[test] = len(shown)
			}
			way := line.Way
			if way == "" {
				way = "–"
			}
			fmt.Fprintf(&b, "| %s | %s | %s | %s | %d |\n", line.Name, way, line.Class, line.Note, numbers[test])
		}
	}
	b.WriteString("\n## Tests\n\n")
	for i, test := range shown {
		fmt.Fprintf(&b, "%d. `%s`\n", i+1, test)
	}
	return b.String()
}
