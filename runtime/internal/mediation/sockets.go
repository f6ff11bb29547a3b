package mediation

import (
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/abi/linux"
)

// Any stands for all types or protocols that have no line of their own.
const Any = -1

// Socket is what socket(2) is asked for.
type Socket struct {
	Family   int
	Type     linux.SockType
	Protocol int
	Line
}

var sockets = []Socket{
	{linux.AF_INET, linux.SOCK_STREAM, 0, Line{Name: "AF_INET stream", Class: EndsAtEndpoint, Way: "a connection to anybody", Note: "a Stream of package endpoint"}},
	{linux.AF_INET, linux.SOCK_STREAM, unix.IPPROTO_TCP, Line{Name: "AF_INET stream TCP", Class: EndsAtEndpoint, Way: "a connection to anybody", Note: "as the stream above"}},
	{linux.AF_INET, linux.SOCK_DGRAM, 0, Line{Name: "AF_INET dgram", Class: EndsAtEndpoint, Way: "a datagram to anybody, QUIC and DNS among them", Note: "a Datagrams of package endpoint: none leaves; the guard answers those to port 53"}},
	{linux.AF_INET, linux.SOCK_DGRAM, unix.IPPROTO_UDP, Line{Name: "AF_INET dgram UDP", Class: EndsAtEndpoint, Way: "a datagram to anybody", Note: "as the dgram above"}},
	{linux.AF_INET, linux.SOCK_STREAM, unix.IPPROTO_MPTCP, Line{Name: "AF_INET stream MPTCP", Class: Refused, Way: "one stream over several connections: none of them whole", Note: "gVisor has none; programs then take TCP"}},
	{linux.AF_INET, linux.SOCK_STREAM, unix.IPPROTO_SCTP, Line{Name: "AF_INET stream SCTP", Class: Refused, Way: "streams and messages that no parser reads"}},
	{linux.AF_INET, linux.SOCK_SEQPACKET, unix.IPPROTO_SCTP, Line{Name: "AF_INET seqpacket SCTP", Class: Refused, Way: "streams and messages that no parser reads"}},
	{linux.AF_INET, linux.SOCK_DGRAM, unix.IPPROTO_UDPLITE, Line{Name: "AF_INET dgram UDP-lite", Class: Refused, Way: "datagrams that no parser reads"}},
	{linux.AF_INET, linux.SOCK_DCCP, unix.IPPROTO_DCCP, Line{Name: "AF_INET dccp", Class: Refused, Way: "datagrams that no parser reads"}},
	{linux.AF_INET, linux.SOCK_DGRAM, unix.IPPROTO_L2TP, Line{Name: "AF_INET dgram L2TP", Class: Refused, Way: "a tunnel"}},
	{linux.AF_INET, linux.SOCK_DGRAM, unix.IPPROTO_ICMP, Line{Name: "AF_INET dgram ICMP", Class: Refused, Way: "the payload of an echo request", Note: "ping sockets; gVisor has them"}},
	{linux.AF_INET, linux.SOCK_RAW, unix.IPPROTO_ICMP, Line{Name: "AF_INET raw ICMP", Class: Refused, Way: "packets that the program writes itself", Note: "in front of CAP_NET_RAW, which runsc takes away besides"}},
	{linux.AF_INET, linux.SOCK_RAW, unix.IPPROTO_ICMPV6, Line{Name: "AF_INET raw ICMPV6", Class: Refused, Way: "as above"}},
	{linux.AF_INET, linux.SOCK_RAW, unix.IPPROTO_TCP, Line{Name: "AF_INET raw TCP", Class: Refused, Way: "segments of a connection that the guard never saw"}},
	{linux.AF_INET, linux.SOCK_RAW, unix.IPPROTO_UDP, Line{Name: "AF_INET raw UDP", Class: Refused, Way: "datagrams past the endpoint"}},
	{linux.AF_INET, linux.SOCK_RAW, unix.IPPROTO_RAW, Line{Name: "AF_INET raw RAW", Class: Refused, Way: "whole packets, headers too"}},
	{linux.AF_INET, linux.SOCK_RAW, unix.IPPROTO_IGMP, Line{Name: "AF_INET raw IGMP", Class: Refused, Way: "as above"}},
	{linux.AF_INET, linux.SOCK_RAW, unix.IPPROTO_GRE, Line{Name: "AF_INET raw GRE", Class: Refused, Way: "a tunnel"}},
	{linux.AF_INET, linux.SOCK_RAW, unix.IPPROTO_SCTP, Line{Name: "AF_INET raw SCTP", Class: Refused, Way: "as above"}},
	{linux.AF_INET, linux.SOCK_RAW, Any, Line{Name: "AF_INET raw, other protocols", Class: Refused, Way: "packets that the program writes itself"}},
	{linux.AF_INET, linux.SOCK_PACKET, Any, Line{Name: "AF_INET packet", Class: Refused, Way: "frames that the program writes itself", Note: "the form of AF_PACKET before Linux 2.2"}},
	{linux.AF_INET, linux.SOCK_RDM, Any, Line{Name: "AF_INET rdm", Class: Refused, Way: "messages that no parser reads"}},

	{linux.AF_INET6, linux.SOCK_STREAM, 0, Line{Name: "AF_INET6 stream", Class: EndsAtEndpoint, Way: "a connection to anybody", Note: "v4-mapped addresses are compared as what they stand for"}},
	{linux.AF_INET6, linux.SOCK_STREAM, unix.IPPROTO_TCP, Line{Name: "AF_INET6 stream TCP", Class: EndsAtEndpoint, Way: "a connection to anybody", Note: "as the stream above"}},
	{linux.AF_INET6, linux.SOCK_DGRAM, 0, Line{Name: "AF_INET6 dgram", Class: EndsAtEndpoint, Way: "a datagram to anybody, QUIC and DNS among them", Note: "a Datagrams of package endpoint: none leaves; the guard answers those to port 53"}},
	{linux.AF_INET6, linux.SOCK_DGRAM, unix.IPPROTO_UDP, Line{Name: "AF_INET6 dgram UDP", Class: EndsAtEndpoint, Way: "a datagram to anybody", Note: "as the dgram above"}},
	{linux.AF_INET6, linux.SOCK_STREAM, unix.IPPROTO_MPTCP, Line{Name: "AF_INET6 stream MPTCP", Class: Refused, Way: "one stream over several connections: none of them whole", Note: "gVisor has none; programs then take TCP"}},
	{linux.AF_INET6, linux.SOCK_STREAM, unix.IPPROTO_SCTP, Line{Name: "AF_INET6 stream SCTP", Class: Refused, Way: "streams and messages that no parser reads"}},
	{linux.AF_INET6, linux.SOCK_SEQPACKET, unix.IPPROTO_SCTP, Line{Name: "AF_INET6 seqpacket SCTP", Class: Refused, Way: "streams and messages that no parser reads"}},
	{linux.AF_INET6, linux.SOCK_DGRAM, unix.IPPROTO_UDPLITE, Line{Name: "AF_INET6 dgram UDP-lite", Class: Refused, Way: "datagrams that no parser reads"}},
	{linux.AF_INET6, linux.SOCK_DCCP, unix.IPPROTO_DCCP, Line{Name: "AF_INET6 dccp", Class: Refused, Way: "datagrams that no parser reads"}},
	{linux.AF_INET6, linux.SOCK_DGRAM, unix.IPPROTO_L2TP, Line{Name: "AF_INET6 dgram L2TP", Class: Refused, Way: "a tunnel"}},
	{linux.AF_INET6, linux.SOCK_DGRAM, unix.IPPROTO_ICMPV6, Line{Name: "AF_INET6 dgram ICMP", Class: Refused, Way: "the payload of an echo request", Note: "ping sockets; gVisor has them"}},
	{linux.AF_INET6, linux.SOCK_RAW, unix.IPPROTO_ICMP, Line{Name: "AF_INET6 raw ICMP", Class: Refused, Way: "packets that the program writes itself", Note: "in front of CAP_NET_RAW, which runsc takes away besides"}},
	{linux.AF_INET6, linux.SOCK_RAW, unix.IPPROTO_ICMPV6, Line{Name: "AF_INET6 raw ICMPV6", Class: Refused, Way: "as above"}},
	{linux.AF_INET6, linux.SOCK_RAW, unix.IPPROTO_TCP, Line{Name: "AF_INET6 raw TCP", Class: Refused, Way: "segments of a connection that the guard never saw"}},
	{linux.AF_INET6, linux.SOCK_RAW, unix.IPPROTO_UDP, Line{Name: "AF_INET6 raw UDP", Class: Refused, Way: "datagrams past the endpoint"}},
	{linux.AF_INET6, linux.SOCK_RAW, unix.IPPROTO_RAW, Line{Name: "AF_INET6 raw RAW", Class: Refused, Way: "whole packets, headers too"}},
	{linux.AF_INET6, linux.SOCK_RAW, unix.IPPROTO_IGMP, Line{Name: "AF_INET6 raw IGMP", Class: Refused, Way: "as above"}},
	{linux.AF_INET6, linux.SOCK_RAW, unix.IPPROTO_GRE, Line{Name: "AF_INET6 raw GRE", Class: Refused, Way: "a tunnel"}},
	{linux.AF_INET6, linux.SOCK_RAW, unix.IPPROTO_SCTP, Line{Name: "AF_INET6 raw SCTP", Class: Refused, Way: "as above"}},
	{linux.AF_INET6, linux.SOCK_RAW, Any, Line{Name: "AF_INET6 raw, other protocols", Class: Refused, Way: "packets that the program writes itself"}},
	{linux.AF_INET6, linux.SOCK_PACKET, Any, Line{Name: "AF_INET6 packet", Class: Refused, Way: "frames that the program writes itself", Note: "the form of AF_PACKET before Linux 2.2"}},
	{linux.AF_INET6, linux.SOCK_RDM, Any, Line{Name: "AF_INET6 rdm", Class: Refused, Way: "messages that no parser reads"}},

	{linux.AF_UNIX, Any, Any, Line{Name: "AF_UNIX stream, dgram, seqpacket", Class: Inside, Way: "a socket file of the host, or one on a volume", Note: "abstract names live in the sandbox; the host's sockets need --host-uds, which start.go refuses", Test: "runtime/internal/sentry/table_test.go::TestFilesAreNoWayOut"}},

	{linux.AF_NETLINK, Any, linux.NETLINK_ROUTE, Line{Name: "AF_NETLINK NETLINK_ROUTE", Class: Inside, Way: "addresses, routes and interfaces that lead elsewhere", Note: "reads only: a change takes CAP_NET_ADMIN, which start.go refuses, in the network's own user namespace"}},
	{linux.AF_NETLINK, Any, linux.NETLINK_UNUSED, Line{Name: "AF_NETLINK NETLINK_UNUSED", Class: Refused, Way: "the host's kernel"}},
	{linux.AF_NETLINK, Any, linux.NETLINK_USERSOCK, Line{Name: "AF_NETLINK NETLINK_USERSOCK", Class: Refused, Way: "other programs of the host"}},
	{linux.AF_NETLINK, Any, linux.NETLINK_FIREWALL, Line{Name: "AF_NETLINK NETLINK_FIREWALL", Class: Refused, Way: "the host's kernel"}},
	{linux.AF_NETLINK, Any, linux.NETLINK_SOCK_DIAG, Line{Name: "AF_NETLINK NETLINK_SOCK_DIAG", Class: Refused, Way: "an end to others' connections"}},
	{linux.AF_NETLINK, Any, linux.NETLINK_NFLOG, Line{Name: "AF_NETLINK NETLINK_NFLOG", Class: Refused, Way: "the host's kernel"}},
	{linux.AF_NETLINK, Any, linux.NETLINK_XFRM, Line{Name: "AF_NETLINK NETLINK_XFRM", Class: Refused, Way: "tunnels"}},
	{linux.AF_NETLINK, Any, linux.NETLINK_SELINUX, Line{Name: "AF_NETLINK NETLINK_SELINUX", Class: Refused, Way: "the host's kernel"}},
	{linux.AF_NETLINK, Any, linux.NETLINK_ISCSI, Line{Name: "AF_NETLINK NETLINK_ISCSI", Class: Refused, Way: "the host's kernel"}},
	{linux.AF_NETLINK, Any, linux.NETLINK_AUDIT, Line{Name: "AF_NETLINK NETLINK_AUDIT", Class: Refused, Way: "the host's kernel"}},
	{linux.AF_NETLINK, Any, linux.NETLINK_FIB_LOOKUP, Line{Name: "AF_NETLINK NETLINK_FIB_LOOKUP", Class: Refused, Way: "the host's kernel"}},
	{linux.AF_NETLINK, Any, linux.NETLINK_CONNECTOR, Line{Name: "AF_NETLINK NETLINK_CONNECTOR", Class: Refused, Way: "the host's kernel"}},
	{linux.AF_NETLINK, Any, linux.NETLINK_NETFILTER, Line{Name: "AF_NETLINK NETLINK_NETFILTER", Class: Refused, Way: "rules that rewrite packets"}},
	{linux.AF_NETLINK, Any, linux.NETLINK_IP6_FW, Line{Name: "AF_NETLINK NETLINK_IP6_FW", Class: Refused, Way: "the host's kernel"}},
	{linux.AF_NETLINK, Any, linux.NETLINK_DNRTMSG, Line{Name: "AF_NETLINK NETLINK_DNRTMSG", Class: Refused, Way: "the host's kernel"}},
	{linux.AF_NETLINK, Any, linux.NETLINK_KOBJECT_UEVENT, Line{Name: "AF_NETLINK NETLINK_KOBJECT_UEVENT", Class: Inside, Note: "sends nothing"}},
	{linux.AF_NETLINK, Any, linux.NETLINK_GENERIC, Line{Name: "AF_NETLINK NETLINK_GENERIC", Class: Refused, Way: "drivers of the host"}},
	{linux.AF_NETLINK, Any, linux.NETLINK_SCSITRANSPORT, Line{Name: "AF_NETLINK NETLINK_SCSITRANSPORT", Class: Refused, Way: "the host's kernel"}},
	{linux.AF_NETLINK, Any, linux.NETLINK_ECRYPTFS, Line{Name: "AF_NETLINK NETLINK_ECRYPTFS", Class: Refused, Way: "the host's kernel"}},
	{linux.AF_NETLINK, Any, linux.NETLINK_RDMA, Line{Name: "AF_NETLINK NETLINK_RDMA", Class: Refused, Way: "the host's kernel"}},
	{linux.AF_NETLINK, Any, linux.NETLINK_CRYPTO, Line{Name: "AF_NETLINK NETLINK_CRYPTO", Class: Refused, Way: "the host's kernel"}},
	{linux.AF_NETLINK, Any, Any, Line{Name: "AF_NETLINK, other protocols", Class: Refused, Way: "the host's kernel"}},

	{linux.AF_UNSPEC, Any, Any, Line{Name: "AF_UNSPEC", Class: Refused, Way: "whatever a later gVisor takes it for"}},
	{linux.AF_AX25, Any, Any, Line{Name: "AF_AX25", Class: Refused, Way: "a network that no parser reads", Note: "gVisor has none"}},
	{linux.AF_IPX, Any, Any, Line{Name: "AF_IPX", Class: Refused, Way: "a network that no parser reads", Note: "gVisor has none"}},
	{linux.AF_APPLETALK, Any, Any, Line{Name: "AF_APPLETALK", Class: Refused, Way: "a network that no parser reads", Note: "gVisor has none"}},
	{linux.AF_NETROM, Any, Any, Line{Name: "AF_NETROM", Class: Refused, Way: "a network that no parser reads", Note: "gVisor has none"}},
	{linux.AF_BRIDGE, Any, Any, Line{Name: "AF_BRIDGE", Class: Refused, Way: "frames", Note: "gVisor has none"}},
	{linux.AF_ATMPVC, Any, Any, Line{Name: "AF_ATMPVC", Class: Refused, Way: "a network that no parser reads", Note: "gVisor has none"}},
	{linux.AF_X25, Any, Any, Line{Name: "AF_X25", Class: Refused, Way: "a network that no parser reads", Note: "gVisor has none"}},
	{linux.AF_ROSE, Any, Any, Line{Name: "AF_ROSE", Class: Refused, Way: "a network that no parser reads", Note: "gVisor has none"}},
	{linux.AF_DECnet, Any, Any, Line{Name: "AF_DECnet", Class: Refused, Way: "a network that no parser reads", Note: "gVisor has none"}},
	{linux.AF_NETBEUI, Any, Any, Line{Name: "AF_NETBEUI", Class: Refused, Way: "a network that no parser reads", Note: "gVisor has none"}},
	{linux.AF_SECURITY, Any, Any, Line{Name: "AF_SECURITY", Class: Refused, Way: "a network that no parser reads", Note: "gVisor has none"}},
	{linux.AF_KEY, Any, Any, Line{Name: "AF_KEY", Class: Refused, Way: "tunnels", Note: "gVisor has none"}},
	{linux.AF_PACKET, Any, Any, Line{Name: "AF_PACKET", Class: Refused, Way: "frames that the program writes itself", Note: "gVisor has it for who has CAP_NET_RAW"}},
	{linux.AF_ASH, Any, Any, Line{Name: "AF_ASH", Class: Refused, Way: "a network that no parser reads", Note: "gVisor has none"}},
	{linux.AF_ECONET, Any, Any, Line{Name: "AF_ECONET", Class: Refused, Way: "a network that no parser reads", Note: "gVisor has none"}},
	{linux.AF_ATMSVC, Any, Any, Line{Name: "AF_ATMSVC", Class: Refused, Way: "a network that no parser reads", Note: "gVisor has none"}},
	{linux.AF_RDS, Any, Any, Line{Name: "AF_RDS", Class: Refused, Way: "remote memory", Note: "gVisor has none"}},
	{linux.AF_SNA, Any, Any, Line{Name: "AF_SNA", Class: Refused, Way: "a network that no parser reads", Note: "gVisor has none"}},
	{linux.AF_IRDA, Any, Any, Line{Name: "AF_IRDA", Class: Refused, Way: "a network that no parser reads", Note: "gVisor has none"}},
	{linux.AF_PPPOX, Any, Any, Line{Name: "AF_PPPOX", Class: Refused, Way: "a tunnel", Note: "gVisor has none"}},
	{linux.AF_WANPIPE, Any, Any, Line{Name: "AF_WANPIPE", Class: Refused, Way: "a network that no parser reads", Note: "gVisor has none"}},
	{linux.AF_LLC, Any, Any, Line{Name: "AF_LLC", Class: Refused, Way: "a network that no parser reads", Note: "gVisor has none"}},
	{linux.AF_IB, Any, Any, Line{Name: "AF_IB", Class: Refused, Way: "remote memory", Note: "gVisor has none"}},
	{linux.AF_MPLS, Any, Any, Line{Name: "AF_MPLS", Class: Refused, Way: "a network that no parser reads", Note: "gVisor has none"}},
	{linux.AF_CAN, Any, Any, Line{Name: "AF_CAN", Class: Refused, Way: "a bus", Note: "gVisor has none"}},
	{linux.AF_TIPC, Any, Any, Line{Name: "AF_TIPC", Class: Refused, Way: "messages to other nodes", Note: "gVisor has none"}},
	{linux.AF_BLUETOOTH, Any, Any, Line{Name: "AF_BLUETOOTH", Class: Refused, Way: "a radio", Note: "gVisor has none"}},
	{linux.AF_IUCV, Any, Any, Line{Name: "AF_IUCV", Class: Refused, Way: "a network that no parser reads", Note: "gVisor has none"}},
	{linux.AF_RXRPC, Any, Any, Line{Name: "AF_RXRPC", Class: Refused, Way: "a network that no parser reads", Note: "gVisor has none"}},
	{linux.AF_ISDN, Any, Any, Line{Name: "AF_ISDN", Class: Refused, Way: "a network that no parser reads", Note: "gVisor has none"}},
	{linux.AF_PHONET, Any, Any, Line{Name: "AF_PHONET", Class: Refused, Way: "a network that no parser reads", Note: "gVisor has none"}},
	{linux.AF_IEEE802154, Any, Any, Line{Name: "AF_IEEE802154", Class: Refused, Way: "a radio", Note: "gVisor has none"}},
	{linux.AF_CAIF, Any, Any, Line{Name: "AF_CAIF", Class: Refused, Way: "a network that no parser reads", Note: "gVisor has none"}},
	{linux.AF_ALG, Any, Any, Line{Name: "AF_ALG", Class: Refused, Way: "the host's kernel", Note: "gVisor has none"}},
	{linux.AF_NFC, Any, Any, Line{Name: "AF_NFC", Class: Refused, Way: "a radio", Note: "gVisor has none"}},
	{linux.AF_VSOCK, Any, Any, Line{Name: "AF_VSOCK", Class: Refused, Way: "a stream to the host or to another machine", Note: "gVisor has none"}},
	{unix.AF_KCM, Any, Any, Line{Name: "AF_KCM", Class: Refused, Way: "a network that no parser reads", Note: "gVisor has none"}},
	{unix.AF_QIPCRTR, Any, Any, Line{Name: "AF_QIPCRTR", Class: Refused, Way: "a network that no parser reads", Note: "gVisor has none"}},
	{unix.AF_SMC, Any, Any, Line{Name: "AF_SMC", Class: Refused, Way: "remote memory", Note: "gVisor has none"}},
	{unix.AF_XDP, Any, Any, Line{Name: "AF_XDP", Class: Refused, Way: "frames that the program writes itself", Note: "gVisor has none"}},
	{unix.AF_MCTP, Any, Any, Line{Name: "AF_MCTP", Class: Refused, Way: "a network that no parser reads", Note: "gVisor has none"}},
}

type socketNumbers struct {
	family   int
	kind     linux.SockType
	protocol int
}

var socketsByNumber = func() map[socketNumbers]Class {
	index := make(map[socketNumbers]Class, len(sockets))
	for _, s := range sockets {
		index[socketNumbers{s.Family, s.Type, s.Protocol}] = s.Class
	}
	return index
}()

// SocketClass returns the class of a socket. The line that says most counts, and no line refuses.
func SocketClass(family int, kind linux.SockType, protocol int) Class {
	for _, n := range []socketNumbers{{family, kind, protocol}, {family, kind, Any}, {family, Any, protocol}, {family, Any, Any}} {
		if class, found := socketsByNumber[n]; found {
			return class
		}
	}
	return Refused
}

// EachSocket returns all sockets with their numbers.
func EachSocket() []Socket { return append([]Socket(nil), sockets...) }
