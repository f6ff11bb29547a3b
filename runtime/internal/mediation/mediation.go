// Package mediation says for everything in the linked gVisor by which bytes could leave a sandbox how it is closed.
//
// What has no line here would be a way around the guard that nobody has thought about. Package survey lists what gVisor
// offers, and TestEverythingIsClassified fails when a line is missing. Where the table is asked while a sandbox runs —
// system calls, sockets, socket options, ioctls — what has no line is refused.
package mediation

// Class is how a way out is closed. The zero class refuses.
type Class uint8

// The classes.
const (
	Refused        Class = iota // does not work in a guarded sandbox
	Replaced                    // our function in front of gVisor's; it looks at the call's arguments only
	EndsAtEndpoint              // for sockets ends in a method of the guarded endpoint
	Inside                      // touches nothing outside of the sandbox
	Absent                      // gVisor answers with an error
)

// String says what the document calls the class.
func (c Class) String() string {
	switch c {
	case Replaced:
		return "by argument"
	case EndsAtEndpoint:
		return "ends at the endpoint"
	case Inside:
		return "harmless"
	case Absent:
		return "absent"
	}
	return "refused"
}

// Line is one way out.
type Line struct {
	Name  string
	Class Class
	Way   string // how bytes could leave by it; "" when they cannot
	Note  string
	Test  string // file::name of what shows it, where it is not the kind's and class's usual one

	Unlisted bool // package survey does not find it: Linux has it, and gVisor does not
}

// Lines returns the lines of a kind in the order of the table.
func Lines(kind Kind) []Line {
	switch kind {
	case Sockets:
		return linesOf(sockets, func(s Socket) Line { return s.Line })
	case Options:
		return linesOf(options, func(o Option) Line { return o.Line })
	case Ioctls:
		return linesOf(ioctls, func(i Ioctl) Line { return i.Line })
	}
	return append([]Line(nil), tables[kind]...)
}

func linesOf[T any](table []T, line func(T) Line) []Line {
	lines := make([]Line, 0, len(table))
	for _, entry := range table {
		lines = append(lines, line(entry))
	}
	return lines
}

var tables = map[Kind][]Line{
	Calls: calls, Transports: transports, Providers: providers, Factories: factories, Makers: makers, Methods: methods,
	MessageFlags: messageFlags, Commands: commands, Flags: flags, Annotations: annotations, Filesystems: filesystems,
	Devices: devices, Starts: starts, Files: files, Traffic: traffic,
}

type key struct {
	kind Kind
	name string
}

var byName = func() map[key]Line {
	index := map[key]Line{}
	for _, kind := range Kinds() {
		for _, line := range Lines(kind) {
			index[key{kind, line.Name}] = line
		}
	}
	return index
}()

// Of returns the line of a name.
func Of(kind Kind, name string) (Line, bool) {
	line, found := byName[key{kind, name}]
	return line, found
}
