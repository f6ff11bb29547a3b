package sentry

import (
	"golang.org/x/sys/unix"
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
)

// Netlink protocols that read the sandbox's own state. Changing it takes CAP_NET_ADMIN, which start.go refuses.
const (
	netlinkRoute  = 0
	netlinkUevent = 15
)

// socketCall is socket(2). Everything that sends over the network later does so through an endpoint made here.
func socketCall(original kernel.SyscallFn) kernel.SyscallFn {
	return func(t *kernel.Task, number uintptr, a arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
		switch a[0].Int() {
		case linux.AF_UNIX:
			return original(t, number, a)
		case linux.AF_NETLINK:
			if protocol := a[2].Int(); protocol != netlinkRoute && protocol != netlinkUevent {
				return 0, nil, linuxerr.EPROTONOSUPPORT
			}
			return original(t, number, a)
		case linux.AF_INET:
			return internetSocket(t, linux.AF_INET, ipv4.ProtocolNumber, a)
		case linux.AF_INET6:
			return internetSocket(t, linux.AF_INET6, ipv6.ProtocolNumber, a)
		}
		return 0, nil, linuxerr.EAFNOSUPPORT // packet, vsock and whatever comes next
	}
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

func internetSocket(t *kernel.Task, family int, net tcpip.NetworkProtocolNumber, a arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	kind, flags, protocol := linux.SockType(a[1].Int()&0xf), int(a[1].Int()&^0xf), int(a[2].Int())
	if flags&^(linux.SOCK_NONBLOCK|linux.SOCK_CLOEXEC) != 0 {
		return 0, nil, linuxerr.EINVAL
	}
	var transport tcpip.TransportProtocolNumber
	switch {
	case kind == linux.SOCK_STREAM && (protocol == 0 || protocol == unix.IPPROTO_TCP):
		transport = tcp.ProtocolNumber
	case kind == linux.SOCK_DGRAM && (protocol == 0 || protocol == unix.IPPROTO_UDP):
		transport = udp.ProtocolNumber
	case kind == linux.SOCK_RAW:
		return 0, nil, linuxerr.EPERM
	default: // ping sockets are among these
		return 0, nil, linuxerr.EPROTONOSUPPORT
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
