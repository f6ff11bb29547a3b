package tlshello

import "kalium.dev/kalium/runtime/internal/wire"

// MessageServerHello is the handshake message type of a ServerHello and of a HelloRetryRequest.
const MessageServerHello = 2

const (
	versionTLS12 = 0x0303
	versionTLS13 = 0x0304
)

// retryRandom marks a ServerHello as a HelloRetryRequest (RFC 8446 section 4.1.3).
var retryRandom = [32]byte{
	0xcf, 0x21, 0xad, 0x74, 0xe5, 0x9a, 0x61, 0x11, 0xbe, 0x1d, 0x8c, 0x02, 0x1e, 0x65, 0xb8, 0x91,
	0xc2, 0xa2, 0x11, 0x16, 0x7a, 0xbb, 0x8c, 0x5e, 0x07, 0x9e, 0x09, 0xe2, 0xc8, 0xa8, 0x33, 0x9c,
}

// Server is what the guard needs of a ServerHello.
type Server struct {
	TLS13  bool // else TLS 1.2
	Retry  bool // a HelloRetryRequest
	Suite  uint16
	Random [32]byte
}

// ParseServer reads the body of a ServerHello, without the four bytes of the message header.
func ParseServer(message []byte) (Server, error) {
	var server Server
	body := reader{rest: message}
	version := body.u16()
	copy(server.Random[:], body.bytes(32))
	session := body.vector8()
	server.Suite = body.u16()
	compression := body.byte()
	if body.failed || len(session) > 32 || compression != 0 {
		return Server{}, wire.Malformed("the ServerHello's fixed part does not parse")
	}
	var extensions reader
	if len(body.rest) > 0 {
		extensions.rest = body.vector16()
	}
	if body.failed || len(body.rest) != 0 {
		return Server{}, wire.Malformed("the ServerHello's extensions do not fill its rest")
	}
	selected := false
	for len(extensions.rest) > 0 {
		kind := extensions.u16()
		data := reader{rest: extensions.vector16()}
		if kind != extensionSupportedVersions && !extensions.failed {
			continue
		}
		chosen := data.u16()
		if extensions.failed || data.failed || len(data.rest) != 0 || selected {
			return Server{}, wire.Malformed("the ServerHello's extensions do not parse")
		}
		selected = true
		if chosen != versionTLS13 {
			return Server{}, wire.Unsupported("TLS version %#04x", chosen)
		}
	}
	if version != versionTLS12 {
		return Server{}, wire.Unsupported("TLS version %#04x", version)
	}
	server.TLS13 = selected
	server.Retry = selected && server.Random == retryRandom
	return server, nil
}
