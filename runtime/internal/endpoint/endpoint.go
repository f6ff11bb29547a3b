// Package endpoint puts the guard around gVisor's transport endpoints.
//
// Whatever way a program sends on an internet socket, gVisor ends in Endpoint.Write of the object that socket(2) made.
// That object is a Stream or a Datagrams of this package: it reads the program's memory once, has that copy judged, and
// sends the copy. What arrives is shown to the guard before the program sees it.
//
// The wrappers name every method of tcpip.Endpoint instead of embedding the interface: a method that a later gVisor adds
// is a compile error here, and not a way around the guard.
package endpoint

import (
	"io"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/waiter"

	"kalium.dev/kalium/runtime/internal/guard"
)

// Own tells whether an address belongs to the sandbox, so that packets to it never reach a wire.
type Own func(tcpip.Address) bool

// base is what both wrappers have in common, and the methods that change nothing about what leaves.
type base struct {
	inner tcpip.Endpoint
	queue *waiter.Queue // shared with inner and with gVisor's socket
	guard *guard.Guard
	own   Own
}

// Bind implements tcpip.Endpoint. An interface cannot be chosen: a loopback destination would then be looked for on a
// wire.
func (b *base) Bind(a tcpip.FullAddress) tcpip.Error {
	if a.NIC != 0 {
		return &tcpip.ErrNotPermitted{}
	}
	return b.inner.Bind(a)
}

// SetSockOpt implements tcpip.Endpoint. Joining a multicast group sends a packet with bits that the program chose.
func (b *base) SetSockOpt(o tcpip.SettableSocketOption) tcpip.Error {
	switch o.(type) {
	case *tcpip.AddMembershipOption, *tcpip.MulticastInterfaceOption:
		return &tcpip.ErrNotPermitted{}
	}
	return b.inner.SetSockOpt(o)
}

// GetLocalAddress implements tcpip.Endpoint.
func (b *base) GetLocalAddress() (tcpip.FullAddress, tcpip.Error) { return b.inner.GetLocalAddress() }

// SetSockOptInt implements tcpip.Endpoint.
func (b *base) SetSockOptInt(o tcpip.SockOptInt, v int) tcpip.Error {
	return b.inner.SetSockOptInt(o, v)
}

// GetSockOpt implements tcpip.Endpoint.
func (b *base) GetSockOpt(o tcpip.GettableSocketOption) tcpip.Error { return b.inner.GetSockOpt(o) }

// State implements tcpip.Endpoint.
func (b *base) State() uint32 { return b.inner.State() }

// ModerateRecvBuf implements tcpip.Endpoint.
func (b *base) ModerateRecvBuf(n int) { b.inner.ModerateRecvBuf(n) }

// Info implements tcpip.Endpoint.
func (b *base) Info() tcpip.EndpointInfo { return b.inner.Info() }

// Stats implements tcpip.Endpoint.
func (b *base) Stats() tcpip.EndpointStats { return b.inner.Stats() }

// SetOwner implements tcpip.Endpoint.
func (b *base) SetOwner(o tcpip.PacketOwner) { b.inner.SetOwner(o) }

// SocketOptions implements tcpip.Endpoint.
func (b *base) SocketOptions() *tcpip.SocketOptions { return b.inner.SocketOptions() }

var (
	_ tcpip.Endpoint = (*Stream)(nil)
	_ tcpip.Endpoint = (*Datagrams)(nil)
)

// addressOf converts an address. The empty one, which stands for "any" of either family, becomes the invalid Addr.
func addressOf(a tcpip.Address) netip.Addr {
	switch a.Len() {
	case header.IPv4AddressSize:
		return netip.AddrFrom4(a.As4())
	case header.IPv6AddressSize:
		return netip.AddrFrom16(a.As16()).Unmap()
	}
	return netip.Addr{}
}

func addressPortOf(a tcpip.FullAddress) netip.AddrPort {
	return netip.AddrPortFrom(addressOf(a.Addr), a.Port)
}

var (
	loopback4       = tcpip.AddrFrom4([4]byte{127, 0, 0, 1})
	loopback4Mapped = tcpip.AddrFrom16([16]byte{10: 0xff, 11: 0xff, 12: 127, 15: 1})
	loopback6       = header.IPv6Loopback
)

// definite writes out the destination "any", which means this host (Linux takes it so in connect and sendto), so that
// what is judged is what is reached.
func definite(to tcpip.FullAddress, v6 bool) tcpip.FullAddress {
	address := addressOf(to.Addr)
	switch {
	case address.IsValid() && !address.IsUnspecified():
	case to.Addr.Len() == header.IPv6AddressSize && address.Is4():
		to.Addr = loopback4Mapped
	case v6 && !address.Is4():
		to.Addr = loopback6
	default:
		to.Addr = loopback4
	}
	return to
}

// isOwn tells whether to is reached without a wire. An interface in the address could lead around the loopback route.
func (b *base) isOwn(to tcpip.FullAddress) bool {
	return to.NIC == 0 && b.own(to.Addr)
}

// payload is a Payloader over a slice.
type payload struct{ b []byte }

func (p *payload) Read(b []byte) (int, error) {
	if len(p.b) == 0 {
		return 0, io.EOF
	}
	n := copy(b, p.b)
	p.b = p.b[n:]
	return n, nil
}

func (p *payload) Len() int { return len(p.b) }
