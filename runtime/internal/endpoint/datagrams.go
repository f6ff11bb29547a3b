package endpoint

import (
	"bytes"
	"io"
	"sync"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/waiter"

	"kalium.dev/kalium/runtime/internal/guard"
)

const (
	datagramMax = 65535
	dnsPort     = 53
	answersMax  = 64 // that wait to be read; beyond it an answer is lost, as a datagram may be
)

// Datagrams is a guarded UDP endpoint. Datagrams pass inside the sandbox only. Those to port 53, whatever the address,
// are answered by the guard.
type Datagrams struct {
	base
	v6 bool

	// Connect and Write exclude each other, so that what is judged is where it goes.
	write sync.Mutex
	// resolver is the address on port 53 that the program connected to. The inner endpoint is not connected then: there
	// may be no route to it, and nothing will go there.
	resolver *tcpip.FullAddress

	read     sync.Mutex
	waiting  []datagram
	answered int // of the waiting ones are the guard's
}

type datagram struct {
	data   []byte
	result tcpip.ReadResult
}

// NewDatagrams wraps inner, a UDP endpoint whose waiter queue is queue.
func NewDatagrams(g *guard.Guard, inner tcpip.Endpoint, queue *waiter.Queue, net tcpip.NetworkProtocolNumber, own Own) *Datagrams {
	return &Datagrams{base: base{inner: inner, queue: queue, guard: g, own: own}, v6: net == header.IPv6ProtocolNumber}
}

// Connect implements tcpip.Endpoint. It sends nothing, but chooses where the datagrams of later writes go.
func (d *Datagrams) Connect(to tcpip.FullAddress) tcpip.Error {
	d.write.Lock()
	defer d.write.Unlock()
	to = definite(to, d.v6)
	if to.Port == dnsPort && !d.guard.Off() {
		if d.guard.Associate(addressPortOf(to)) == guard.Denied {
			return &tcpip.ErrNotPermitted{}
		}
		d.resolver = &to
		return nil
	}
	if !d.isOwn(to) && d.guard.Associate(addressPortOf(to)) == guard.Denied {
		return &tcpip.ErrNotPermitted{}
	}
	err := d.inner.Connect(to)
	if err == nil {
		d.resolver = nil
	}
	return err
}

// Disconnect implements tcpip.Endpoint.
func (d *Datagrams) Disconnect() tcpip.Error {
	d.write.Lock()
	defer d.write.Unlock()
	d.resolver = nil
	return d.inner.Disconnect()
}

// GetRemoteAddress implements tcpip.Endpoint.
func (d *Datagrams) GetRemoteAddress() (tcpip.FullAddress, tcpip.Error) {
	d.write.Lock()
	defer d.write.Unlock()
	if d.resolver != nil {
		return *d.resolver, nil
	}
	return d.inner.GetRemoteAddress()
}

// Write implements tcpip.Endpoint. A datagram is judged by its destination; only a query to port 53 is read.
func (d *Datagrams) Write(p tcpip.Payloader, o tcpip.WriteOptions) (int64, tcpip.Error) {
	d.write.Lock()
	defer d.write.Unlock()
	// An interface beside the address would have the stack look for a loopback destination on a wire. The socket layer of
	// the linked gVisor passes none on; one that does must not open a way.
	o.ControlMessages.HasIPv6PacketInfo = false
	var to tcpip.FullAddress
	switch {
	case o.To != nil:
		to = definite(*o.To, d.v6)
		o.To = &to
	case d.resolver != nil:
		to = *d.resolver
	default:
		remote, err := d.inner.GetRemoteAddress()
		if err != nil {
			return 0, &tcpip.ErrDestinationRequired{}
		}
		to = remote
	}
	if to.Port == dnsPort {
		if !d.guard.Off() {
			return d.resolve(p, to)
		}
		if d.resolver != nil && o.To == nil { // it was connected before the guard was switched off
			o.To = &to
		}
	}
	// The address that a connected socket reports carries the interface that gVisor chose for it.
	own := o.To == nil && d.own(to.Addr) || d.isOwn(to)
	if !own && d.guard.Datagram(addressPortOf(to)) == guard.Denied {
		return 0, &tcpip.ErrNotPermitted{}
	}
	return d.inner.Write(p, o)
}

// resolve gives the guard's answer to a query. It looks as if it came from the server that was asked.
func (d *Datagrams) resolve(p tcpip.Payloader, server tcpip.FullAddress) (int64, tcpip.Error) {
	n := p.Len()
	if n > datagramMax {
		return 0, &tcpip.ErrMessageTooLong{}
	}
	query := make([]byte, n)
	if _, err := io.ReadFull(p, query); err != nil && n > 0 {
		return 0, &tcpip.ErrBadBuffer{}
	}
	answer := d.guard.Resolve(query)
	if answer == nil {
		return 0, &tcpip.ErrNotPermitted{}
	}
	d.read.Lock()
	if d.answered < answersMax {
		d.waiting = append(d.waiting, datagram{data: answer, result: tcpip.ReadResult{RemoteAddr: server}})
		d.answered++
	}
	d.read.Unlock()
	d.queue.Notify(waiter.ReadableEvents)
	return int64(n), nil
}

// Read implements tcpip.Endpoint.
func (d *Datagrams) Read(w io.Writer, o tcpip.ReadOptions) (tcpip.ReadResult, tcpip.Error) {
	d.read.Lock()
	defer d.read.Unlock()
	for len(d.waiting) == 0 {
		if err := d.receive(o); err != nil {
			return tcpip.ReadResult{}, err
		}
	}
	first := &d.waiting[0]
	result := first.result
	n, err := w.Write(first.data)
	result.Count, result.Total = n, len(first.data)
	if !o.NeedRemoteAddr {
		result.RemoteAddr = tcpip.FullAddress{}
	}
	if n == 0 && err != nil && result.Total > 0 {
		return tcpip.ReadResult{}, &tcpip.ErrBadBuffer{}
	}
	if !o.Peek {
		if d.answered > 0 {
			d.answered--
		}
		if d.waiting = d.waiting[1:]; len(d.waiting) == 0 {
			d.waiting = nil
		}
	}
	return result, nil
}

// receive takes one datagram from the inner endpoint and keeps it when it came from inside the sandbox. The lock of the
// reading side is held.
func (d *Datagrams) receive(o tcpip.ReadOptions) tcpip.Error {
	var data bytes.Buffer
	o.Peek, o.NeedRemoteAddr = false, true
	result, err := d.inner.Read(&data, o)
	if err != nil {
		return err
	}
	if d.own(result.RemoteAddr.Addr) || d.guard.DatagramFrom(addressPortOf(result.RemoteAddr)) != guard.Denied {
		d.waiting = append(d.waiting, datagram{data: data.Bytes(), result: result})
	}
	return nil
}

// Readiness implements tcpip.Endpoint.
func (d *Datagrams) Readiness(mask waiter.EventMask) waiter.EventMask {
	ready := d.inner.Readiness(mask)
	d.read.Lock()
	defer d.read.Unlock()
	if len(d.waiting) > 0 {
		ready |= mask & waiter.ReadableEvents
	}
	return ready
}

// GetSockOptInt implements tcpip.Endpoint. A datagram that waits here comes first.
func (d *Datagrams) GetSockOptInt(o tcpip.SockOptInt) (int, tcpip.Error) {
	if o == tcpip.ReceiveQueueSizeOption {
		d.read.Lock()
		defer d.read.Unlock()
		if len(d.waiting) > 0 {
			return len(d.waiting[0].data), nil
		}
	}
	return d.inner.GetSockOptInt(o)
}

// Close implements tcpip.Endpoint.
func (d *Datagrams) Close() { d.inner.Close() }

// Abort implements tcpip.Endpoint.
func (d *Datagrams) Abort() { d.inner.Abort() }

// Shutdown implements tcpip.Endpoint.
func (d *Datagrams) Shutdown(f tcpip.ShutdownFlags) tcpip.Error { return d.inner.Shutdown(f) }

// Listen implements tcpip.Endpoint.
func (d *Datagrams) Listen(backlog int) tcpip.Error { return d.inner.Listen(backlog) }

// Accept implements tcpip.Endpoint. Datagram endpoints have nothing to accept.
func (d *Datagrams) Accept(peer *tcpip.FullAddress) (tcpip.Endpoint, *waiter.Queue, tcpip.Error) {
	return nil, nil, &tcpip.ErrNotSupported{}
}

// LastError implements tcpip.Endpoint.
func (d *Datagrams) LastError() tcpip.Error { return d.inner.LastError() }
