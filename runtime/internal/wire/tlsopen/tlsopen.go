// Package tlsopen opens what a TLS client sends with the keys that the client itself has logged, and seals it again.
//
// The client is the attacker. It may log what it likes, speak TLS by its own code, and know which bytes are looked for.
// What holds nevertheless: either every byte that the server takes for application data was handed out as Data before, or
// the server ends the connection. AEADs do not commit to their key, and nothing ties a logged key to the connection, so
// opening a record does not show what the server will read in it. Therefore no record of the client leaves once
// application keys are in force. Ours leave, sealed under the logged key, and the first byte of application data stands
// in one of its own: a record that is made by us from one byte is valid under no other key (2^-128), so a server that has
// another one ends the connection there.
//
// Before that, records leave as they are: hellos, and messages of the handshake in a strict order, which in TLS 1.3 have
// to open under the logged handshake key, and the Finished of TLS 1.2 under the logged master secret. A wrong key gains
// nothing there either. Application data counts for a server only behind a Finished, all bits of which, and of the
// records before it, go into its own hash; so a record that is that Finished for the server leaves no freedom to make it
// open as something else for us, and we stop passing records where the server starts to take data.
//
// Everything that would hide a message is refused: encrypted hellos, early data, renegotiation, padding, authentication
// behind the handshake, suites without an AEAD or with CCM.
package tlsopen

import (
	"bytes"
	"fmt"
	"io"
	"slices"

	"kalium.dev/kalium/runtime/internal/policy"
	"kalium.dev/kalium/runtime/internal/wire"
	"kalium.dev/kalium/runtime/internal/wire/tlshello"
)

// Bounds of what is no application data.
const (
	handshakeBytesMax = 32 * 1024 // behind the hellos, in all; a client's certificates may be in it
	alertsMax         = 8
	updatesMax        = 1024
	fragmentBytesLeft = 512 // the smallest maximum that a server may ask for (RFC 6066 section 4)
)

// Hello is what is judged of a ClientHello.
type Hello = tlshello.Hello

// UnitKind says what a unit is and what leaves for it.
type UnitKind uint8

// The kinds of units.
const (
	_           UnitKind = iota
	KindHello            // a ClientHello, the first or the second: it leaves as it is, once it was judged
	KindPass             // a part of the handshake: it leaves as it is
	KindData             // application data: what Seal makes of it leaves
	KindControl          // an alert or a KeyUpdate: what SealControl makes leaves
)

// Unit is one record of the client; a hello may stand in several.
type Unit struct {
	Kind  UnitKind
	Hello *Hello // of KindHello
	Data  []byte // of KindData: lies in the bytes that were given to Next; may be empty
}

// Client follows the client's side of one connection. Inbound and InboundDone may be called beside the other methods,
// which may not be called beside each other.
type Client struct {
	// OnRecord, if it is set, is called by Next for each whole record behind the hello, before its key is looked for.
	OnRecord func()

	keys   *Keys
	server server

	stage   stage
	refused error
	holds   bool // keys holds hello's random
	hello   *Hello
	hellos  int
	changes int // ChangeCipherSpecs that mean nothing
	alerts  int
	updates int
	closed  bool // by an alert: nothing but alerts follows
	flight  flight
	scratch []byte // where a record is opened that leaves as it is

	opening  protection
	sealing  protection
	opened   bool // some record under the application key
	split    bool // the first byte of application data has its record
	fragment int  // the most content that our records may have; the server may have asked the client for small ones

	control     [5]byte // an alert or a KeyUpdate that waits for SealControl
	controlKind byte
	controlLen  int
}

type stage uint8

const (
	silent    stage = iota // nothing was sent
	greeted                // hello
	exchanged              // TLS 1.2: key exchange
	changed                // TLS 1.2: ChangeCipherSpec; Finished follows
	finishing              // TLS 1.3: handshake keys are in force
	protected              // Finished
)

// NewClient begins where the client has sent nothing yet.
func NewClient(keys *Keys) *Client { return &Client{keys: keys, fragment: fragmentBytesLeft} }

// Close forgets the keys that were held for the connection. Every Client needs it at last.
func (c *Client) Close() {
	c.release()
	c.refused = wire.Malformed("bytes on a closed connection")
}

func (c *Client) release() {
	if c.holds {
		c.holds = false
		c.keys.release(c.hello.Random)
	}
}

// Format prints no secret, with no verb.
func (c *Client) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "tlsopen.Client") }

// Inbound takes the server's bytes in their order, in any cuts, before the client reads them. What is wrong with them is
// said by Next.
func (c *Client) Inbound(b []byte) { c.server.take(b) }

// InboundDone tells that nothing more of the server's bytes is needed.
func (c *Client) InboundDone() bool { return c.server.done.Load() }

// Opened tells that a record under the application key has opened. From then on the bytes that Next is given can never
// leave as they are, since our own records have taken their place; before, Next has changed none of them, even when it
// refuses.
func (c *Client) Opened() bool { return c.opened }

// Next reads the record at the front of b, or the hello; n counts its bytes. wire.ErrShort: it is not whole; b is as it
// was. After any other error the client cannot be followed any more, and every further call gives the same.
func (c *Client) Next(b []byte) (n int, u Unit, err error) {
	if c.refused != nil {
		return 0, Unit{}, c.refused
	}
	if n, err = c.next(b, &u); err != nil {
		if err != wire.ErrShort {
			c.release()
			c.refused = err
		}
		return 0, Unit{}, err
	}
	return n, u, nil
}

// next and those below it fill u, whatever they return.
func (c *Client) next(b []byte, u *Unit) (n int, err error) {
	if c.stage == silent {
		return c.greet(b, u)
	}
	kind, length, err := recordHeader(b)
	if err != nil {
		return 0, err
	}
	if kind == contentHandshake && c.stage == greeted {
		if s := c.server.now(); s.refused == nil && s.retry && !s.answered {
			return c.greet(b, u)
		}
	}
	if n = headerBytes + length; len(b) < n {
		return 0, wire.ErrShort
	}
	if c.OnRecord != nil {
		c.OnRecord()
	}
	record := b[:n]
	u.Kind = KindPass
	switch c.stage {
	case greeted, exchanged:
		err = c.clear(kind, record)
	case changed:
		err = c.finished(kind, record)
	case finishing:
		err = c.handshake(kind, record)
	default: // protected
		err = c.application(kind, record, u)
	}
	return n, err
}

// recordHeader refuses each byte as soon as it is there.
func recordHeader(b []byte) (kind byte, length int, err error) {
	if len(b) > 0 && (b[0] < contentChangeCipherSpec || b[0] > contentApplicationData) {
		return 0, 0, wire.Malformed("record type %d", b[0])
	}
	if len(b) > 1 && b[1] != 3 || len(b) > 2 && (b[2] < 1 || b[2] > 3) {
		return 0, 0, wire.Malformed("a record's version")
	}
	if len(b) < headerBytes {
		return 0, 0, wire.ErrShort
	}
	length = int(b[3])<<8 | int(b[4])
	if length == 0 || length > recordBytesMax {
		return 0, 0, wire.Malformed("a record of %d bytes", length)
	}
	return b[0], length, nil
}

// greet reads a hello. The second one, which a HelloRetryRequest asks for, must be for the same server (RFC 8446 section
// 4.1.2).
func (c *Client) greet(b []byte, u *Unit) (int, error) {
	hello, n, err := tlshello.Parse(b)
	if err != nil {
		return 0, err
	}
	switch {
	case hello.ECH:
		return 0, wire.Unsupported("an encrypted hello")
	case hello.EarlyData:
		return 0, wire.Unsupported("early data")
	case c.hellos == 0:
		if c.holds = c.keys.hold(hello.Random); !c.holds {
			return 0, noKey("more keys were logged than are kept")
		}
		c.hello, c.stage = &hello, greeted
	case c.hellos > 1:
		return 0, wire.Malformed("a third ClientHello")
	case hello.SNI != c.hello.SNI:
		return 0, &wire.Error{Reason: policy.ReasonSNIMismatch, Text: "a second ClientHello for another server"}
	case hello.Random != c.hello.Random || !slices.Equal(hello.ALPN, c.hello.ALPN):
		return 0, wire.Malformed("a second ClientHello that differs from the first")
	}
	c.hellos++
	*u = Unit{Kind: KindHello, Hello: &hello}
	return n, nil
}

// clear reads what is not encrypted, and the record that shows that keys have come into force.
func (c *Client) clear(kind byte, record []byte) error {
	body := record[headerBytes:]
	if len(body) > fragmentBytes {
		return wire.Malformed("a record of %d bytes", len(body))
	}
	if kind == contentAlert {
		return c.alert(body)
	}
	if c.closed {
		return errClosed
	}
	s := c.server.now()
	switch {
	case s.refused != nil:
		return s.refused
	case !s.answered && (!s.retry || kind != contentChangeCipherSpec):
		return wire.Malformed("record type %d before a ServerHello", kind)
	}
	tls13 := s.retry || s.hello.TLS13
	suite := suites[s.hello.Suite]
	if suite == nil || suite.tls13 != tls13 {
		return wire.Unsupported("cipher suite %#04x", s.hello.Suite)
	}
	switch {
	case kind == contentChangeCipherSpec:
		if len(body) != 1 || body[0] != 1 {
			return wire.Malformed("a ChangeCipherSpec of other content")
		}
		if tls13 {
			// One for the sake of middleboxes before each flight (RFC 8446 appendix D.4).
			if c.changes++; c.changes > c.hellos {
				return wire.Malformed("a ChangeCipherSpec out of place")
			}
			return nil
		}
		if !c.flight.mayEnd() {
			return wire.Malformed("a ChangeCipherSpec out of place")
		}
		// OpenSSL logs the secret when it makes the Finished, and with kernel TLS wanted it sends this record before.
		c.stage = changed
		return nil
	case kind == contentHandshake && !tls13:
		c.stage = exchanged
		_, err := c.flight.take(body, flightTLS12)
		return err
	case kind == contentApplicationData && tls13:
		logged := c.keys.get(c.hello.Random, handshakeSecret)
		if logged.n == 0 {
			return noKey("no handshake secret was logged")
		}
		var err error
		if c.opening, err = suite.traffic(logged.bytes[:logged.n]); err != nil {
			return err
		}
		c.stage = finishing
		return c.handshake(kind, record)
	}
	return wire.Malformed("record type %d inside the handshake", kind)
}

// masterKeys takes the keys of TLS 1.2.
func (c *Client) masterKeys() error {
	logged := c.keys.get(c.hello.Random, masterSecret)
	if logged.n == 0 {
		return noKey("no master secret was logged")
	}
	var err error
	s := c.server.now()
	if c.opening, err = suites[s.hello.Suite].client(logged.bytes[:logged.n], c.hello.Random, s.hello.Random); err != nil {
		return err
	}
	c.release()
	return nil
}

const finishedBytes = 12 // verify_data of TLS 1.2 (RFC 5246 section 7.4.9)

// finished reads the Finished of TLS 1.2, which must open and be nothing else.
func (c *Client) finished(kind byte, record []byte) error {
	if kind != contentHandshake {
		return wire.Malformed("record type %d where a Finished is expected", kind)
	}
	if err := c.masterKeys(); err != nil {
		return err
	}
	content, _, err := c.openCopy(record)
	if err != nil {
		return err
	}
	if len(content) != messageHeaderBytes+finishedBytes || !bytes.HasPrefix(content, []byte{messageFinished, 0, 0, finishedBytes}) {
		return wire.Malformed("a Finished of other content")
	}
	c.sealing = c.opening
	c.sealing.explicit++
	c.stage, c.scratch = protected, nil
	return nil
}

// handshake reads what is encrypted under the handshake key of TLS 1.3.
func (c *Client) handshake(kind byte, record []byte) error {
	if kind != contentApplicationData {
		return wire.Malformed("record type %d inside the handshake", kind)
	}
	content, kind, err := c.openCopy(record)
	if err != nil {
		return err
	}
	switch {
	case kind == contentAlert:
		return c.alert(content)
	case c.closed:
		return errClosed
	case kind != contentHandshake || len(content) == 0:
		return wire.Malformed("content type %d under the handshake key", kind)
	}
	ended, err := c.flight.take(content, flightTLS13(c.opening.suite.digest))
	if ended {
		// The application secret may be logged only after this record was written.
		c.stage, c.opening.aead, c.scratch = protected, nil, nil
	}
	return err
}

// openCopy opens a record that leaves as it is.
func (c *Client) openCopy(record []byte) (content []byte, kind byte, err error) {
	if err := checkVersion(record); err != nil {
		return nil, 0, err
	}
	c.scratch = append(c.scratch[:0], record...)
	return c.opening.openInPlace(c.scratch)
}

func checkVersion(record []byte) error {
	if record[2] != 3 {
		return wire.Malformed("an encrypted record's version")
	}
	return nil
}

// application reads what is encrypted under the application key.
func (c *Client) application(kind byte, record []byte, u *Unit) error {
	if err := checkVersion(record); err != nil {
		return err
	}
	if c.opening.suite.tls13 && kind != contentApplicationData || kind == contentChangeCipherSpec {
		return wire.Malformed("record type %d behind the handshake", kind)
	}
	if c.opening.aead == nil {
		if err := c.applicationKeys(); err != nil {
			return err
		}
	}
	content, kind, err := c.openFirst(record)
	switch {
	case err != nil:
		return err
	case kind == contentAlert:
		u.Kind = KindControl
		c.keep(kind, content)
		return c.alert(content)
	case c.closed:
		return errClosed
	case kind == contentHandshake:
		u.Kind = KindControl
		return c.keyUpdate(content)
	case kind == contentApplicationData:
		c.fragment = max(c.fragment, len(content))
		u.Kind, u.Data = KindData, content
		return nil
	}
	return wire.Malformed("content type %d behind the handshake", kind)
}

// openFirst opens a record in place. The first one under the key is kept until it has opened: a wrong key must not spoil
// what may leave as it is where nothing is enforced.
func (c *Client) openFirst(record []byte) (content []byte, kind byte, err error) {
	if c.opened {
		return c.opening.openInPlace(record)
	}
	kept := slices.Clone(record)
	content, kind, err = c.opening.openInPlace(record)
	if err != nil {
		copy(record, kept)
		return nil, 0, err
	}
	c.opened = true
	return content, kind, nil
}

func (c *Client) applicationKeys() error {
	logged := c.keys.get(c.hello.Random, applicationSecret)
	if logged.n == 0 {
		return noKey("no application secret was logged")
	}
	p, err := c.opening.suite.traffic(logged.bytes[:logged.n])
	if err != nil {
		return err
	}
	c.release()
	c.opening, c.sealing = p, p
	return nil
}

var errClosed = wire.Malformed("bytes behind the end of the connection")

// Alerts of RFC 8446 section 6.
const (
	alertWarning      = 1
	alertFatal        = 2
	alertCloseNotify  = 0
	alertUserCanceled = 90
)

func (c *Client) alert(content []byte) error {
	if c.alerts++; c.alerts > alertsMax {
		return wire.TooLarge("more than %d alerts", alertsMax)
	}
	if len(content) != 2 || content[0] != alertWarning && content[0] != alertFatal {
		return wire.Malformed("an alert of other content")
	}
	// All but one end the connection in TLS 1.3, and the fatal ones before.
	tls13 := c.opening.suite != nil && c.opening.suite.tls13
	if content[0] == alertFatal || content[1] == alertCloseNotify || tls13 && content[1] != alertUserCanceled {
		c.closed = true
	}
	return nil
}

// keyUpdate reads the only handshake message that a client may send behind its handshake (RFC 8446 section 4.6.3).
func (c *Client) keyUpdate(content []byte) error {
	switch {
	case !c.opening.suite.tls13:
		return wire.Unsupported("a renegotiation")
	case len(content) == 0:
		return wire.Malformed("an empty handshake record")
	case content[0] != messageKeyUpdate:
		return wire.Unsupported("handshake message %d behind the handshake", content[0])
	case len(content) != messageHeaderBytes+1 || messageLength(content) != 1 || content[messageHeaderBytes] > 1:
		return wire.Malformed("a KeyUpdate of other content")
	}
	if c.updates++; c.updates > updatesMax {
		return wire.TooLarge("more than %d KeyUpdates", updatesMax)
	}
	next, err := c.opening.update()
	if err != nil {
		return err
	}
	c.keep(contentHandshake, content)
	c.opening = next
	return nil
}

func (c *Client) keep(kind byte, content []byte) {
	c.controlKind, c.controlLen = kind, copy(c.control[:], content)
}

// Seal appends to dst the records that carry plain, which dst must not overlap. Nothing leaves before a unit of KindData
// has come. The first byte of the connection has a record of its own.
func (c *Client) Seal(dst, plain []byte) []byte {
	if c.sealing.aead == nil {
		return dst
	}
	for len(plain) > 0 {
		n := min(len(plain), c.fragment)
		if !c.split {
			c.split, n = true, 1
		}
		dst = c.sealing.seal(dst, contentApplicationData, plain[:n])
		plain = plain[n:]
	}
	return dst
}

// SealControl appends to dst the record that stands for the last unit of KindControl. It has to be called once for each
// of them, before the next call of Next or Seal.
func (c *Client) SealControl(dst []byte) []byte {
	if c.controlLen == 0 {
		return dst
	}
	dst = c.sealing.seal(dst, c.controlKind, c.control[:c.controlLen])
	if c.controlKind == contentHandshake {
		c.sealing = c.opening
	}
	c.controlLen = 0
	return dst
}
