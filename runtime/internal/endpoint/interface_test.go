package endpoint

import (
	"bytes"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/link/loopback"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// TestADatagramChoosesNoInterface sends to the sandbox's own addresses and names the wire's interface beside them, as
// IPV6_PKTINFO of sendmsg(2) does on Linux. The stack would look for the address on the wire then.
func TestADatagramChoosesNoInterface(t *testing.T) {
	n := newNet(t, "enforce")
	s := stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{udp.NewProtocol},
		HandleLocal:        true,
	})
	t.Cleanup(s.Destroy)
	wire := channel.New(16, 1500, "")
	must(t, s.CreateNIC(1, loopback.New()))
	must(t, s.CreateNIC(2, wire))
	eth0 := tcpip.AddrFrom16([16]byte{0xfd, 15: 10})
	for nic, addresses := range map[tcpip.NICID][]tcpip.Address{
		1: {address("127.0.0.1"), header.IPv6Loopback},
		2: {address("10.137.0.10"), eth0},
	} {
		for _, a := range addresses {
			protocol := ipv6.ProtocolNumber
			if a.Len() == header.IPv4AddressSize {
				protocol = ipv4.ProtocolNumber
			}
			must(t, s.AddProtocolAddress(nic, tcpip.ProtocolAddress{Protocol: protocol, AddressWithPrefix: a.WithPrefix()}, stack.AddressProperties{}))
		}
	}
	s.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: 2}, {Destination: header.IPv6EmptySubnet, NIC: 2}})
	inside := func(a tcpip.Address) bool {
		if header.IsV4MappedAddress(a) {
			a = a.To4()
		}
		return a == eth0 || a == header.IPv6Loopback || own(a)
	}
	mapped := func(text string) tcpip.Address {
		a := [16]byte{10: 0xff, 11: 0xff}
		v4 := address(text).As4()
		copy(a[12:], v4[:])
		return tcpip.AddrFrom16(a)
	}
	wire.Drain() // what interfaces say when they come up

	for what, to := range map[string]tcpip.Address{
		"loopback": header.IPv6Loopback, "own": eth0, "mapped loopback": mapped("127.0.0.1"), "mapped own": mapped("10.137.0.10"),
	} {
		for _, info := range []tcpip.IPv6PacketInfo{{NIC: 2}, {NIC: 1}, {NIC: 2, Addr: eth0}, {Addr: eth0}, {Addr: header.IPv6Loopback}} {
			for _, connect := range []bool{false, true} {
				queue := &waiter.Queue{}
				inner, err := s.NewEndpoint(udp.ProtocolNumber, ipv6.ProtocolNumber, queue)
				must(t, err)
				d := NewDatagrams(n.guard, inner, queue, ipv6.ProtocolNumber, inside)
				options := tcpip.WriteOptions{ControlMessages: tcpip.SendableControlMessages{HasIPv6PacketInfo: true, IPv6PacketInfo: info}}
				if connect {
					must(t, d.Connect(tcpip.FullAddress{Addr: to, Port: 9}))
				} else {
					options.To = &tcpip.FullAddress{Addr: to, Port: 9}
				}
				d.Write(bytes.NewReader([]byte("x")), options) // whatever comes of it, it is not a packet on the wire
				if packets := wire.Drain(); packets != 0 {
					t.Errorf("to %s by %+v, connected %v: %d packets left", what, info, connect, packets)
				}
				d.Close()
			}
		}
	}
}
