package guard

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"strings"
	"testing"

	"golang.org/x/net/http2/hpack"

	"kalium.dev/kalium/runtime/internal/wire/http2"
)

// h2 writes the client's side of HTTP/2 connections.
type h2 struct {
	bytes.Buffer
	encoder *hpack.Encoder
	block   bytes.Buffer
}

// Frame types and flags of RFC 9113 section 6.
const (
	h2Data, h2Headers, h2Settings, h2Ping = 0, 1, 4, 6
	h2EndStream, h2EndHeaders             = 1, 4
)

func newH2() *h2 {
	h := &h2{}
	h.encoder = hpack.NewEncoder(&h.block)
	h.WriteString(http2.Preface)
	h.frame(h2Settings, 0, 0, "")
	return h
}

func (h *h2) frame(kind, flags byte, stream uint32, payload string) {
	n := len(payload)
	h.Write(binary.BigEndian.AppendUint32([]byte{byte(n >> 16), byte(n >> 8), byte(n), kind, flags}, stream))
	h.WriteString(payload)
}

func (h *h2) request(stream uint32, flags byte, fields ...string) {
	h.block.Reset()
	for i := 0; i < len(fields); i += 2 {
		h.encoder.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	h.frame(h2Headers, flags|h2EndHeaders, stream, h.block.String())
}

// take returns what was written since the last call.
func (h *h2) take() string {
	text := h.String()
	h.Reset()
	return text
}

func pseudo(method, authority, path string) []string {
	return []string{":method", method, ":scheme", "https", ":authority", authority, ":path", path}
}

func dialH2(t *testing.T, g *Guard) *secured {
	return dialTLS(t, g, images, logged(g, &tls.Config{ServerName: "images.test", NextProtos: []string{"h2"}}), &tls.Config{NextProtos: []string{"h2"}})
}

func TestEachStreamOfHTTP2IsJudged(t *testing.T) {
	g, c, _ := invoked(t, "enforce")
	s := dialH2(t, g)
	h := newH2()
	h.request(1, h2EndStream, pseudo("GET", "images.test:4443", "/i")...)
	h.request(3, h2EndStream, pseudo("GET", "images.test:4443", "/i")...)
	h.frame(h2Ping, 0, 0, "12345678")
	allowed := h.take()
	if _, err := s.Write([]byte(allowed)); err != nil {
		t.Fatalf("%v, verdict %+v", err, c.Last(t))
	}
	if r := c.Last(t); r.Kind != "https" || r.Message != "https GET images /i" || !r.Allowed {
		t.Errorf("verdict %+v", r)
	}

	h.request(5, h2EndStream, pseudo("GET", "images.test:4443", "/secret")...)
	_, err := s.Write([]byte(h.take()))

	if r := c.Last(t); !errors.Is(err, errDenied) || r.Reason != "not_in_policy" || r.Message != "https GET images /secret" {
		t.Errorf("%v, verdict %+v", err, r)
	}
	if got := s.arrived(); got != allowed {
		t.Errorf("%q arrived, want %q", got, allowed)
	}
}

func TestARequestOfHTTP2ThatIsNotForThePeerIsDenied(t *testing.T) {
	for reason, fields := range map[string][]string{
		"unknown_peer": pseudo("GET", "images.other:4443", "/i"),
		"unsupported":  append(pseudo("GET", "images.test:4443", "/i"), "x-http-method-override", "DELETE"),
		"too_large":    append(pseudo("POST", "images.test:4443", "/i"), "content-length", "101"),
	} {
		g, c, _ := invoked(t, "enforce")
		s := dialH2(t, g)
		h := newH2()
		flags := byte(h2EndStream)
		if reason == "too_large" {
			flags = 0
		}
		h.request(1, flags, fields...)

		_, err := s.Write([]byte(h.take()))

		if r := c.Last(t); !errors.Is(err, errDenied) || r.Reason != reason {
			t.Errorf("%v, verdict %+v, want %s", err, r, reason)
		}
	}
}

func TestABodyOfHTTP2IsBoundedAndEndsWithItsInvocation(t *testing.T) {
	for _, reason := range []string{"too_large", "no_invocation"} {
		g, c, in := invoked(t, "enforce")
		g.live.cursor = atState(g, 3)
		s := dialH2(t, g)
		h := newH2()
		h.request(1, 0, pseudo("PUT", "images.test:4443", "/p")...)
		h.frame(h2Data, 0, 1, "0123456789")
		allowed := h.take()
		if _, err := s.Write([]byte(allowed)); err != nil {
			t.Fatalf("%v, verdict %+v", err, c.Last(t))
		}
		if reason == "no_invocation" {
			in.Answer([]byte("HTTP/1.1 204 No Content\r\n\r\n"))
		}
		h.frame(h2Data, h2EndStream, 1, strings.Repeat("x", 91))

		_, err := s.Write([]byte(h.take()))

		if r := c.Last(t); !errors.Is(err, errDenied) || r.Reason != reason {
			t.Errorf("%v, verdict %+v, want %s", err, r, reason)
		}
		if got := s.arrived(); got != allowed {
			t.Errorf("%q arrived", got)
		}
	}
}
