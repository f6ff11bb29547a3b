package sentry

import (
	"gvisor.dev/gvisor/pkg/abi/linux"
	"gvisor.dev/gvisor/pkg/errors/linuxerr"
	"gvisor.dev/gvisor/pkg/sentry/arch"
	"gvisor.dev/gvisor/pkg/sentry/kernel"
	"gvisor.dev/gvisor/pkg/sentry/socket/netstack"
	"gvisor.dev/gvisor/pkg/sentry/vfs"
	"gvisor.dev/gvisor/pkg/syserr"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"

	"kalium.dev/kalium/runtime/internal/endpoint"
	"kalium.dev/kalium/runtime/internal/mediation"
)

// socketCall is socket(2). Everything that sends over the network later does so through an endpoint made here.
func socketCall(original kernel.SyscallFn) kernel.SyscallFn {
	return func(t *kernel.Task, number uintptr, a arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
		family, kind, protocol := int(a[0].Int()), linux.SockType(a[1].Int()&linux.SOCK_TYPE_MASK), int(a[2].Int())
		switch mediation.SocketClass(family, kind, protocol) {
		case mediation.Inside:
			return original(t, number, a)
		case mediation.EndsAtEndpoint:
			if isPause(t.ContainerID()) {
				return 0, nil, linuxerr.EACCES
			}
			return internetSocket(t, family, kind, int(a[1].Int()&^linux.SOCK_TYPE_MASK))
		}
		return 0, nil, refusedSocket(family, kind)
	}
}

// refusedSocket is the error of a kernel that does not have what was asked for, or not for this program.
func refusedSocket(family int, kind linux.SockType) error {
	switch family {
	case linux.AF_INET, linux.AF_INET6:
		if kind == linux.SOCK_RAW {
			return linuxerr.EPERM
		}
		return linuxerr.EPROTONOSUPPORT
	case linux.AF_NETLINK:
		return linuxerr.EPROTONOSUPPORT
	}
	return linuxerr.EAFNOSUPPORT
}

// socketPairCall is socketpair(2).
func socketPairCall(original kernel.SyscallFn) kernel.SyscallFn {
	return func(t *kernel.Task, number uintptr, a arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
		if a[0].Int() != linux.AF_UNIX {
			return 0, nil, linuxerr.EAFNOSUPPORT
		}
		return original(t, number, a)
	}
}

// internetSocket makes a guarded stream or a guarded socket for datagrams.
func internetSocket(t *kernel.Task, family int, kind linux.SockType, flags int) (uintptr, *kernel.SyscallControl, error) {
	if flags&^(linux.SOCK_NONBLOCK|linux.SOCK_CLOEXEC) != 0 {
		return 0, nil, linuxerr.EINVAL
	}
	net := ipv4.ProtocolNumber
	if family == linux.AF_INET6 {
		net = ipv6.ProtocolNumber
	}
	transport := udp.ProtocolNumber
	if kind == linux.SOCK_STREAM {
		transport = tcp.ProtocolNumber
	}
	network, ok := t.NetworkContext().(*netstack.Stack)
	if !ok || network == nil || network.Stack == nil {
		return 0, nil, linuxerr.EAFNOSUPPORT // the host's network, a plug-in, or none
	}
	queue := &waiter.Queue{}
	inner, failed := network.Stack.NewEndpoint(transport, net, queue)
	if failed != nil {
		return 0, nil, syserr.TranslateNetstackError(failed).ToError()
	}
	inner.SetOwner(t)
	var guarded tcpip.Endpoint
	if transport == tcp.ProtocolNumber {
		guarded = endpoint.NewStream(installed.Load(), inner, queue, net, ownAddresses(network.Stack))
	} else {
		guarded = endpoint.NewDatagrams(installed.Load(), inner, queue, net, ownAddresses(network.Stack))
	}
	file, err := netstack.New(t, family, kind, int(transport), queue, guarded)
	if err != nil {
		guarded.Close()
		return 0, nil, err.ToError()
	}
	defer file.DecRef(t)
	return descriptor(t, file, flags)
}

func descriptor(t *kernel.Task, file *vfs.FileDescription, flags int) (uintptr, *kernel.SyscallControl, error) {
	if err := file.SetStatusFlags(t, t.Credentials(), uint32(flags&linux.SOCK_NONBLOCK)); err != nil {
		return 0, nil, err
	}
	t.Kernel().RecordSocket(file)
	fd, err := t.NewFDFrom(0, file, kernel.FDFlags{CloseOnExec: flags&linux.SOCK_CLOEXEC != 0})
	if err != nil {
		return 0, nil, err
	}
	return uintptr(fd), nil, nil
}

// ownAddresses tells the addresses to which packets do not reach a wire. The addresses of interfaces are compared one
// by one: gVisor's own look-up also takes a subnet's broadcast address for one of them, and a broadcast does leave.
func ownAddresses(s *stack.Stack) endpoint.Own {
	return func(a tcpip.Address) bool {
		net := ipv4.ProtocolNumber
		if a.Len() == header.IPv6AddressSize {
			net = ipv6.ProtocolNumber
			if header.IsV4MappedAddress(a) {
				net, a = ipv4.ProtocolNumber, a.To4()
			}
		}
		if header.IsV4LoopbackAddress(a) || header.IsV6LoopbackAddress(a) {
			// Without a loopback interface even such a packet would follow the default route.
			return s.CheckLocalAddress(0, net, a) != 0
		}
		for _, addresses := range s.AllAddresses() {
			for _, address := range addresses {
				if address.Protocol == net && address.AddressWithPrefix.Address == a {
					return true
				}
			}
		}
		return false
	}
}
