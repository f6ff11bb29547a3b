package mediation

// Kind is a kind of thing that could lead bytes out of a sandbox.
type Kind string

// The kinds, in the order of the document. Those up to Devices are listed by package survey from the linked gVisor; the
// others are ways that no list of gVisor's shows.
const (
	Calls        Kind = "system calls"
	Sockets      Kind = "sockets"
	Transports   Kind = "transports of the internet families"
	Providers    Kind = "socket providers"
	Factories    Kind = "transport protocols of the stack"
	Makers       Kind = "endpoint makers"
	Methods      Kind = "methods of an endpoint"
	Options      Kind = "socket options"
	MessageFlags Kind = "flags of a message"
	Ioctls       Kind = "ioctls"
	Commands     Kind = "commands of runsc"
	Flags        Kind = "flags of runsc"
	Annotations  Kind = "annotations of gVisor"
	Filesystems  Kind = "file systems"
	Devices      Kind = "devices"
	Starts       Kind = "what a start brings in"
	Files        Kind = "ways through files"
	Traffic      Kind = "ways on the network"
)

// Kinds lists all kinds.
func Kinds() []Kind {
	return []Kind{
		Calls, Sockets, Transports, Providers, Factories, Makers, Methods, Options, MessageFlags, Ioctls,
		Commands, Flags, Annotations, Filesystems, Devices, Starts, Files, Traffic,
	}
}
