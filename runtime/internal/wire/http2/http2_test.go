package http2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/net/http2/hpack"

	"kalium.dev/kalium/runtime/internal/policy"
	"kalium.dev/kalium/runtime/internal/wire"
	"kalium.dev/kalium/runtime/internal/wire/http1"
)

// script writes a client's bytes.
type script struct {
	bytes.Buffer
	block   bytes.Buffer
	encoder *hpack.Encoder
}

// begun is a connection behind its preface.
func begun() *script {
	s := &script{}
	s.encoder = hpack.NewEncoder(&s.block)
	s.WriteString(Preface)
	return s.frame(frameSettings, 0, 0, "")
}

func (s *script) frame(kind frameType, flags byte, stream uint32, payload string) *script {
	n := len(payload)
	s.Write([]byte{byte(n >> 16), byte(n >> 8), byte(n), byte(kind), flags})
	s.Write(binary.BigEndian.AppendUint32(nil, stream))
	s.WriteString(payload)
	return s
}

// fields encodes "name: value" lines.
func (s *script) fields(lines ...string) string {
	s.block.Reset()
	for _, line := range lines {
		at := strings.Index(line[1:], ":") + 1
		if err := s.encoder.WriteField(hpack.HeaderField{Name: line[:at], Value: strings.TrimPrefix(line[at+1:], " ")}); err != nil {
			panic(err)
		}
	}
	return s.block.String()
}

var getLines = []string{":method: GET", ":scheme: https", ":authority: api", ":path: /a"}
var postLines = []string{":method: POST", ":scheme: https", ":authority: api", ":path: /a"}

func (s *script) get(stream uint32, more ...string) *script {
	return s.frame(frameHeaders, flagEndHeaders|flagEndStream, stream, s.fields(append(slices.Clone(getLines), more...)...))
}

func (s *script) post(stream uint32, more ...string) *script {
	return s.frame(frameHeaders, flagEndHeaders, stream, s.fields(append(slices.Clone(postLines), more...)...))
}

func (s *script) data(stream uint32, end bool, content string) *script {
	flags := byte(0)
	if end {
		flags = flagEndStream
	}
	return s.frame(frameData, flags, stream, content)
}

// u32 and setting are parts of payloads.
func u32(values ...uint32) string {
	var b []byte
	for _, v := range values {
		b = binary.BigEndian.AppendUint32(b, v)
	}
	return string(b)
}

func setting(id uint16, value uint32) string {
	return string(binary.BigEndian.AppendUint16(nil, id)) + u32(value)
}

// read gives b to a new client in pieces that cut chooses and writes down its units. Content of one stream is joined.
func read(b []byte, cut func(left int) int) (log []string, rest int, err error) {
	client := NewClient()
	at, end := 0, 0
	for at < len(b) {
		if end = min(len(b), end+cut(len(b)-end)); end <= at {
			continue
		}
		for at < end {
			n, u, err := client.Next(b[at:end:end])
			if err == wire.ErrShort {
				if n != 0 {
					return log, len(b) - at, fmt.Errorf("%d bytes with ErrShort", n)
				}
				break
			}
			if err != nil {
				return log, len(b) - at, err
			}
			if n <= 0 || n > end-at {
				return log, len(b) - at, fmt.Errorf("%d of %d bytes", n, end-at)
			}
			at += n
			log = note(log, u)
		}
		if end == len(b) {
			break
		}
	}
	return log, len(b) - at, nil
}

func note(log []string, u Unit) []string {
	switch u.Kind {
	case Support:
		return append(log, u.Text)
	case Request:
		return append(log, fmt.Sprintf("%d %s %s://%s %s %q %d end %t grpc %t %v",
			u.Stream, u.Head.Method, u.Head.Scheme, u.Head.Authority, u.Head.Path, u.Head.Query, u.Head.ContentLength, u.End, u.Head.GRPC, u.Head.Fields))
	case Reset:
		return append(log, fmt.Sprintf("%d reset", u.Stream))
	case Data:
		prefix, size := fmt.Sprintf("%d data ", u.Stream), 0
		if last := len(log) - 1; last >= 0 && strings.HasPrefix(log[last], prefix) && !strings.HasSuffix(log[last], "end") {
			if _, err := fmt.Sscanf(log[last][len(prefix):], "%d", &size); err != nil {
				panic(err)
			}
			log = log[:last]
		}
		end := ""
		if u.End {
			end = " end"
		}
		return append(log, fmt.Sprintf("%s%d%s", prefix, size+u.Bytes, end))
	}
	return append(log, "a unit without a kind")
}

func whole(left int) int { return left }
func single(int) int     { return 1 }

func TestAConnectionIsRead(t *testing.T) {
	s := begun()
	s.frame(frameWindowUpdate, 0, 0, u32(1<<20))
	s.frame(framePriority, 0, 3, u32(0)+"\xc8")
	s.get(7, "user-agent: curl/7.88.1", "accept: */*")
	s.frame(frameSettings, flagAck, 0, "")
	s.post(9, "host: API", "content-length: 5")
	s.data(9, false, "he")
	s.frame(framePing, 0, 0, "12345678")
	s.get(11)
	s.frame(frameData, flagEndStream|flagPadded, 9, "\x04llo\x00\x00\x00\x00")
	s.post(13, "content-type: application/grpc+proto", "te: trailers")
	s.data(13, false, "")
	s.data(13, true, "")
	s.post(15)
	s.frame(frameReset, 0, 15, u32(8))
	s.frame(frameReset, 0, 2, u32(7))
	s.frame(frameHeaders, flagEndHeaders|flagEndStream|flagPadded|flagPriority, 17,
		"\x02"+u32(1<<31|3)+"\x0f"+s.fields(":method: HEAD", ":path: /b/c?d=%20&e", ":scheme: http", ":authority: Api.Example:8443")+"\x00\x00")
	block := s.fields(append(slices.Clone(postLines), "content-length: 0")...)
	s.frame(frameHeaders, flagEndStream, 19, block[:1])
	s.frame(frameContinuation, 0, 19, block[1:4])
	s.frame(frameContinuation, flagEndHeaders, 19, block[4:])
	s.frame(frameGoAway, 0, 0, u32(0, 0)+"bye")
	want := []string{
		"preface", "SETTINGS", "WINDOW_UPDATE", "PRIORITY",
		`7 GET https://api /a [] 0 end true grpc false [{user-agent curl/7.88.1} {accept */*}]`,
		"SETTINGS ack",
		`9 POST https://api /a [] 5 end false grpc false [{host API} {content-length 5}]`,
		"9 data 2", "PING",
		`11 GET https://api /a [] 0 end true grpc false []`,
		"9 data 3 end",
		`13 POST https://api /a [] -1 end false grpc true [{content-type application/grpc+proto} {te trailers}]`,
		"13 data 0 end",
		`15 POST https://api /a [] -1 end false grpc false []`,
		"15 reset", "RST_STREAM",
		`17 HEAD http://api.example:8443 /b/c ["d" "e"] 0 end true grpc false []`,
		`19 POST https://api /a [] 0 end true grpc false [{content-length 0}]`,
		"GOAWAY",
	}
	for name, cut := range map[string]func(int) int{"whole": whole, "byte by byte": single, "in sevens": func(int) int { return 7 }} {
		log, rest, err := read(s.Bytes(), cut)
		if err != nil || rest != 0 || !slices.Equal(log, want) {
			t.Errorf("%s: %d bytes left, %v\n%s", name, rest, err, strings.Join(log, "\n"))
		}
	}
}

func TestWhatIsNotReadTheSameByAllIsRefused(t *testing.T) {
	head := func(lines ...string) *script {
		s := begun()
		return s.frame(frameHeaders, flagEndHeaders|flagEndStream, 1, s.fields(lines...))
	}
	raw := func(block string) *script { return begun().frame(frameHeaders, flagEndHeaders|flagEndStream, 1, block) }
	bare := func(text string) *script { s := &script{}; s.WriteString(text); return s }
	first := func(kind frameType, flags byte, payload string) *script {
		return bare(Preface).frame(kind, flags, 0, payload)
	}
	path := func(p string) *script { return head(":method: GET", ":scheme: https", ":authority: api", ":path: "+p) }
	for name, c := range map[string]struct {
		script *script
		reason policy.Reason
	}{
		// The beginning.
		"HTTP/1.1":                   {bare("GET / HTTP/1.1\r\n"), "malformed"},
		"a preface of HTTP/3":        {bare("PRI * HTTP/3"), "malformed"},
		"no SETTINGS":                {bare(Preface).frame(frameHeaders, flagEndHeaders|flagEndStream, 1, begun().fields(getLines...)), "malformed"},
		"an acknowledgement instead": {first(frameSettings, flagAck, ""), "malformed"},
		// Frames.
		"an unknown type":              {begun().frame(0xb, 0, 0, ""), "unsupported"},
		"PRIORITY_UPDATE":              {begun().frame(0x10, 0, 0, u32(1)+"u=1"), "unsupported"},
		"ALTSVC":                       {begun().frame(0xa, 0, 1, "x"), "unsupported"},
		"PUSH_PROMISE":                 {begun().get(1).frame(framePushPromise, flagEndHeaders, 1, u32(2)), "malformed"},
		"a CONTINUATION of nothing":    {begun().frame(frameContinuation, flagEndHeaders, 1, ""), "malformed"},
		"a reserved bit":               {begun().frame(framePing, 0, 1<<31, "12345678"), "malformed"},
		"an undefined flag":            {begun().frame(framePing, 2, 0, "12345678"), "malformed"},
		"a flag of another frame":      {begun().frame(frameSettings, flagEndHeaders, 0, ""), "malformed"},
		"PING of 7":                    {begun().frame(framePing, 0, 0, "1234567"), "malformed"},
		"PING on a stream":             {begun().get(1).frame(framePing, 0, 1, "12345678"), "malformed"},
		"PRIORITY of 6":                {begun().frame(framePriority, 0, 1, "123456"), "malformed"},
		"PRIORITY on no stream":        {begun().frame(framePriority, 0, 0, u32(0)+"x"), "malformed"},
		"PRIORITY on itself":           {begun().frame(framePriority, 0, 3, u32(3)+"x"), "malformed"},
		"WINDOW_UPDATE of 0":           {begun().frame(frameWindowUpdate, 0, 0, u32(0)), "malformed"},
		"WINDOW_UPDATE with a bit":     {begun().frame(frameWindowUpdate, 0, 0, u32(1<<31)), "malformed"},
		"WINDOW_UPDATE of 5":           {begun().frame(frameWindowUpdate, 0, 0, "12345"), "malformed"},
		"WINDOW_UPDATE, idle":          {begun().frame(frameWindowUpdate, 0, 1, u32(1)), "malformed"},
		"RST_STREAM, idle":             {begun().frame(frameReset, 0, 1, u32(8)), "malformed"},
		"RST_STREAM on none":           {begun().frame(frameReset, 0, 0, u32(8)), "malformed"},
		"RST_STREAM of 3":              {begun().get(1).frame(frameReset, 0, 1, "123"), "malformed"},
		"RST_STREAM with a word":       {begun().get(1).frame(frameReset, 0, 1, "word"), "malformed"},
		"GOAWAY of 7":                  {begun().frame(frameGoAway, 0, 0, "1234567"), "malformed"},
		"GOAWAY on a stream":           {begun().get(1).frame(frameGoAway, 0, 1, u32(0, 0)), "malformed"},
		"GOAWAY with a word":           {begun().frame(frameGoAway, 0, 0, u32(0)+"word"), "malformed"},
		"GOAWAY for an odd stream":     {begun().frame(frameGoAway, 0, 0, u32(1, 0)), "malformed"},
		"GOAWAY with bytes":            {begun().frame(frameGoAway, 0, 0, u32(0, 0)+"\x01"), "malformed"},
		"GOAWAY with a book":           {begun().frame(frameGoAway, 0, 0, u32(0, 0)+strings.Repeat("x", debugMax+1)), "malformed"},
		"GOAWAY again and again":       {begun().times(9, frameGoAway, 0, u32(0, 0)), "too_large"},
		"SETTINGS of 5":                {begun().frame(frameSettings, 0, 0, "12345"), "malformed"},
		"SETTINGS ack with content":    {begun().frame(frameSettings, flagAck, 0, setting(1, 0)), "malformed"},
		"SETTINGS on a stream":         {begun().get(1).frame(frameSettings, 0, 1, ""), "malformed"},
		"a setting twice":              {begun().frame(frameSettings, 0, 0, setting(3, 1)+setting(3, 2)), "malformed"},
		"an unknown setting":           {begun().frame(frameSettings, 0, 0, setting(7, 1)), "unsupported"},
		"a setting that greases":       {begun().frame(frameSettings, 0, 0, setting(0x0a0a, 1)), "unsupported"},
		"ENABLE_PUSH 2":                {begun().frame(frameSettings, 0, 0, setting(2, 2)), "malformed"},
		"INITIAL_WINDOW_SIZE 2^31":     {begun().frame(frameSettings, 0, 0, setting(4, 1<<31)), "malformed"},
		"MAX_FRAME_SIZE 16383":         {begun().frame(frameSettings, 0, 0, setting(5, 1<<14-1)), "malformed"},
		"MAX_FRAME_SIZE 2^24":          {begun().frame(frameSettings, 0, 0, setting(5, 1<<24)), "malformed"},
		"1025 SETTINGS":                {begun().times(1024, frameSettings, 0, ""), "too_large"},
		"SETTINGS too long":            {begun().frame(frameSettings, 0, 0, strings.Repeat(setting(3, 1), len(settings)+1)), "malformed"},
		"DATA on no stream":            {begun().data(0, true, ""), "malformed"},
		"DATA on an idle stream":       {begun().data(1, true, "x"), "malformed"},
		"DATA behind the end":          {begun().get(1).data(1, true, "x"), "malformed"},
		"DATA behind a reset":          {begun().post(1).frame(frameReset, 0, 1, u32(8)).data(1, true, "x"), "malformed"},
		"empty DATA for ever":          {begun().post(1).times(1025, frameData, 1, ""), "too_large"},
		"padding for ever":             {begun().post(1).timesFlags(1025, frameData, flagPadded, 1, "\x00"), "too_large"},
		"padding with a message":       {begun().post(1).frame(frameData, flagPadded, 1, "\x01ab"), "malformed"},
		"padding longer than DATA":     {begun().post(1).frame(frameData, flagPadded, 1, "\x02a"), "malformed"},
		"padding without its length":   {begun().post(1).frame(frameData, flagPadded, 1, ""), "malformed"},
		"padding in HEADERS":           {begun().frame(frameHeaders, flagPadded|flagEndHeaders, 1, "\x01\x82x"), "malformed"},
		"padding longer than HEADERS":  {begun().frame(frameHeaders, flagPadded|flagEndHeaders, 1, "\x02\x00"), "malformed"},
		"padded HEADERS without":       {begun().frame(frameHeaders, flagPadded|flagEndHeaders, 1, ""), "malformed"},
		"a priority of 4":              {begun().frame(frameHeaders, flagPriority|flagEndHeaders, 1, "1234"), "malformed"},
		"HEADERS that depend on their": {begun().frame(frameHeaders, flagPriority|flagEndHeaders, 1, u32(1)+"x"), "malformed"},
		// Streams.
		"an even stream":               {begun().get(2), "malformed"},
		"stream 0":                     {begun().get(0), "malformed"},
		"a stream again":               {begun().get(1).get(1), "malformed"},
		"a stream behind a higher one": {begun().get(3).get(1), "malformed"},
		"trailers":                     {begun().post(1).frame(frameHeaders, flagEndHeaders|flagEndStream, 1, ""), "unsupported"},
		"129 open streams":             {begun().posts(openMax).get(2*openMax + 1), "too_large"},
		// Heads in several frames.
		"another frame between":        {begun().frame(frameHeaders, 0, 1, "\x82").frame(framePing, 0, 0, "12345678"), "malformed"},
		"another stream between":       {begun().frame(frameHeaders, 0, 1, "\x82").frame(frameContinuation, 0, 3, "\x84"), "malformed"},
		"an empty CONTINUATION":        {begun().frame(frameHeaders, 0, 1, "\x82").frame(frameContinuation, 0, 1, ""), "malformed"},
		"CONTINUATIONs for ever":       {begun().frame(frameHeaders, 0, 1, "\x82").times(9, frameContinuation, 1, "\x84"), "too_large"},
		"CONTINUATIONs without an end": {begun().frame(frameHeaders, 0, 1, "\x82").times(3, frameContinuation, 1, strings.Repeat("\x84", 8000)), "too_large"},
		"HEADERS of 17000":             {begun().frame(frameHeaders, 0, 1, strings.Repeat("\x84", 17000)), "too_large"},
		// HPACK.
		"index 0":                   {raw("\x80"), "malformed"},
		"an index beyond":           {raw("\xff\xff\x03"), "malformed"},
		"an endless integer":        {raw("\xff" + strings.Repeat("\xff", 12)), "malformed"},
		"a cut string":              {raw("\x82\x87\x84\x41\x0aapi"), "malformed"},
		"a broken Huffman code":     {raw("\x82\x87\x84\x41\x84\xff\xff\xff\xff"), "malformed"},
		"a table of 16385":          {raw("\x3f\xe2\x7f" + begun().fields(getLines...)), "malformed"},
		"a table update behind":     {raw("\x82\x40\x01a\x01b\x20"), "malformed"},
		"a string of 17000":         {raw("\x82\x00\x01a\x7f\xe9\x83\x01"), "too_large"},
		"a bomb":                    {raw(begun().fields(getLines...) + begun().fields("x: "+strings.Repeat("y", 2000)) + strings.Repeat("\xbe", 100)), "too_large"},
		"a head of 17000 in pieces": {head(append(slices.Clone(getLines), lines(17, 1000)...)...), "too_large"},
		"101 fields":                {head(append(slices.Clone(getLines), lines(101, 1)...)...), "too_large"},
		// Pseudo-fields.
		"no fields":            {raw(""), "malformed"},
		"no method":            {head(getLines[1:]...), "malformed"},
		"no scheme":            {head(getLines[0], getLines[2], getLines[3]), "malformed"},
		"no authority":         {head(getLines[0], getLines[1], getLines[3], "host: api"), "malformed"},
		"no path":              {head(getLines[:3]...), "unsupported"},
		"two methods":          {head(append(slices.Clone(getLines), ":method: GET")...), "malformed"},
		"two paths":            {head(append(slices.Clone(getLines), ":path: /b")...), "malformed"},
		"two authorities":      {head(append(slices.Clone(getLines), ":authority: api")...), "malformed"},
		"two schemes":          {head(append(slices.Clone(getLines), ":scheme: https")...), "malformed"},
		"an empty path":        {path(""), "malformed"},
		"a late pseudo-field":  {head(getLines[0], getLines[1], "a: b", getLines[2], getLines[3]), "malformed"},
		":status":              {head(append(slices.Clone(getLines), ":status: 200")...), "unsupported"},
		":protocol":            {head(":method: CONNECT", ":protocol: websocket", ":scheme: https", ":authority: api", ":path: /"), "unsupported"},
		"CONNECT":              {head(":method: CONNECT", ":authority: api:443"), "unsupported"},
		"TRACE":                {head(":method: TRACE", ":scheme: https", ":authority: api", ":path: /"), "unsupported"},
		"a method in small":    {head(":method: get", ":scheme: https", ":authority: api", ":path: /"), "malformed"},
		"a method with a line": {head(":method: GET /x HTTP/1.1\r\nA", ":scheme: https", ":authority: api", ":path: /"), "malformed"},
		"scheme ftp":           {head(":method: GET", ":scheme: ftp", ":authority: api", ":path: /"), "malformed"},
		"scheme HTTPS":         {head(":method: GET", ":scheme: HTTPS", ":authority: api", ":path: /"), "malformed"},
		"a user":               {head(":method: GET", ":scheme: https", ":authority: u@api", ":path: /"), "malformed"},
		"an asterisk":          {head(":method: OPTIONS", ":scheme: https", ":authority: api", ":path: *"), "unsupported"},
		"an absolute path":     {path("https://other/"), "unsupported"},
		"an escape":            {path("/%61"), "malformed"},
		"a dot segment":        {path("/a/../b"), "malformed"},
		"an empty segment":     {path("//b"), "malformed"},
		"a space":              {path("/a b"), "malformed"},
		"a line":               {path("/a HTTP/1.1\r\nb"), "malformed"},
		"a key twice":          {path("/a?b=1&b=2"), "malformed"},
		"a fragment":           {path("/a#b"), "malformed"},
		// Fields.
		"a capital":              {head(append(slices.Clone(getLines), "X-A: b")...), "malformed"},
		"an underscore":          {head(append(slices.Clone(getLines), "x_a: b")...), "malformed"},
		"a colon":                {head(append(slices.Clone(getLines), "a :b: c")...), "malformed"},
		"a field without a name": {raw(begun().fields(getLines...) + "\x00\x00\x01a"), "malformed"},
		"a line feed":            {head(append(slices.Clone(getLines), "a: b\nc")...), "malformed"},
		"a return":               {head(append(slices.Clone(getLines), "a: b\rc")...), "malformed"},
		"a zero byte":            {head(append(slices.Clone(getLines), "a: b\x00c")...), "malformed"},
		"a byte beyond ASCII":    {head(append(slices.Clone(getLines), "a: \xe9")...), "malformed"},
		"a space before":         {head(append(slices.Clone(getLines), "a:  b")...), "malformed"},
		"a tab behind":           {head(append(slices.Clone(getLines), "a: b\t")...), "malformed"},
		"connection":             {head(append(slices.Clone(getLines), "connection: close")...), "malformed"},
		"transfer-encoding":      {head(append(slices.Clone(getLines), "transfer-encoding: chunked")...), "malformed"},
		"upgrade":                {head(append(slices.Clone(getLines), "upgrade: h2c")...), "malformed"},
		"keep-alive":             {head(append(slices.Clone(getLines), "keep-alive: timeout=5")...), "malformed"},
		"proxy-connection":       {head(append(slices.Clone(getLines), "proxy-connection: close")...), "malformed"},
		"http2-settings":         {head(append(slices.Clone(getLines), "http2-settings: x")...), "malformed"},
		"trailer":                {head(append(slices.Clone(getLines), "trailer: x")...), "unsupported"},
		"te gzip":                {head(append(slices.Clone(getLines), "te: gzip")...), "malformed"},
		"te in a list":           {head(append(slices.Clone(getLines), "te: trailers, gzip")...), "malformed"},
		"another host":           {head(append(slices.Clone(getLines), "host: other")...), "malformed"},
		"two hosts":              {head(append(slices.Clone(getLines), "host: api", "host: api")...), "malformed"},
		"an expectation":         {head(append(slices.Clone(getLines), "expect: 200-ok")...), "malformed"},
		"two expectations":       {head(append(slices.Clone(getLines), "expect: 100-continue", "expect: 100-continue")...), "malformed"},
		"two content types":      {head(append(slices.Clone(getLines), "content-type: a/b", "content-type: a/b")...), "malformed"},
		"another method":         {head(append(slices.Clone(getLines), "x-http-method-override: DELETE")...), "unsupported"},
		"another target":         {head(append(slices.Clone(getLines), "x-original-url: /admin")...), "unsupported"},
		// Bodies.
		"two lengths":                {begun().post(1, "content-length: 1", "content-length: 1"), "malformed"},
		"a length with a sign":       {begun().post(1, "content-length: +1"), "malformed"},
		"a length without a body":    {head(append(slices.Clone(postLines), "content-length: 1")...), "malformed"},
		"a GET with a body":          {begun().frame(frameHeaders, flagEndHeaders, 1, begun().fields(getLines...)), "unsupported"},
		"more than its length":       {begun().post(1, "content-length: 1").data(1, true, "ab"), "malformed"},
		"more in sum":                {begun().post(1, "content-length: 3").data(1, false, "ab").data(1, true, "cd"), "malformed"},
		"less than its length":       {begun().post(1, "content-length: 3").data(1, true, "ab"), "malformed"},
		"more than nothing":          {begun().post(1, "content-length: 0").data(1, true, "a"), "malformed"},
		"padding does not count":     {begun().post(1, "content-length: 3").frame(frameData, flagPadded|flagEndStream, 1, "\x01a\x00"), "malformed"},
		"a gRPC call by GET":         {head(append(slices.Clone(getLines), "content-type: application/grpc", "te: trailers")...), "malformed"},
		"a gRPC call without te":     {begun().post(1, "content-type: application/grpc"), "malformed"},
		"a gRPC call in other words": {begun().post(1, "content-type: Application/GRPC-web+proto"), "malformed"},
	} {
		for cutting, cut := range map[string]func(int) int{"whole": whole, "byte by byte": single} {
			_, _, err := read(c.script.Bytes(), cut)

			var refused *wire.Error
			if !errors.As(err, &refused) || refused.Reason != c.reason {
				t.Errorf("%s, %s: %v; want %s", name, cutting, err, c.reason)
			}
		}
	}
}

func (s *script) times(n int, kind frameType, stream uint32, payload string) *script {
	return s.timesFlags(n, kind, 0, stream, payload)
}

func (s *script) timesFlags(n int, kind frameType, flags byte, stream uint32, payload string) *script {
	for range n {
		s.frame(kind, flags, stream, payload)
	}
	return s
}

// inPieces writes a request whose head is in so many frames.
func (s *script) inPieces(stream uint32, frames int, lines []string) *script {
	block := s.fields(append(slices.Clone(lines), "x: "+strings.Repeat("y", frames))...)
	kind, flags := frameHeaders, byte(flagEndStream)
	for i := range frames - 1 {
		s.frame(kind, flags, stream, block[i:i+1])
		kind, flags = frameContinuation, 0
	}
	return s.frame(frameContinuation, flagEndHeaders, stream, block[frames-1:])
}

func (s *script) posts(n int) *script {
	for i := range n {
		s.post(uint32(2*i + 1))
	}
	return s
}

func lines(n, size int) (lines []string) {
	for range n {
		lines = append(lines, "x: "+strings.Repeat("y", size))
	}
	return lines
}

func TestTheBoundsThemselvesPass(t *testing.T) {
	fits := http1.HeadBytesMax - 4
	for _, line := range append(slices.Clone(getLines), "x: ") {
		fits -= len(line) + len("\r\n")
	}
	fits += len("\r\n") - len(": \r\n") + len(": ")
	table := begun()
	table.encoder.SetMaxDynamicTableSizeLimit(tableMax)
	table.encoder.SetMaxDynamicTableSize(tableMax)
	for name, s := range map[string]*script{
		"128 open streams":    begun().posts(openMax),
		"100 fields":          begun().get(1, lines(http1.FieldsMax, 1)...),
		"a head of 16384":     begun().get(1, "x: "+strings.Repeat("~", fits)),
		"a table of 16384":    table.get(1),
		"8 CONTINUATIONs":     begun().inPieces(1, 1+continuationsMax, getLines),
		"the settings":        begun().frame(frameSettings, 0, 0, setting(1, 65536)+setting(2, 0)+setting(3, 100)+setting(4, 1<<31-1)+setting(5, 1<<14)+setting(6, 65536)+setting(0xfe03, 1)),
		"1024 SETTINGS":       begun().times(controlMax[controlSettings]-1, frameSettings, 0, ""),
		"DATA of 2^24-1":      begun().post(1).data(1, true, strings.Repeat("x", 1<<24-1)),
		"the last stream":     begun().get(1<<31 - 1),
		"a GOAWAY for all":    begun().frame(frameGoAway, 0, 0, u32(1<<31-1, 0)),
		"a window on a reset": begun().post(1).frame(frameReset, 0, 1, u32(8)).frame(frameWindowUpdate, 0, 1, u32(1)),
	} {
		if _, rest, err := read(s.Bytes(), whole); err != nil || rest != 0 {
			t.Errorf("%s: %d bytes left, %v", name, rest, err)
		}
	}
}

func TestAConnectionsMemoryIsBounded(t *testing.T) {
	const clients, bound = 200, 64 << 10
	s := begun()
	s.encoder.SetMaxDynamicTableSizeLimit(tableMax)
	s.encoder.SetMaxDynamicTableSize(tableMax)
	s.get(1)
	for i := range 10 { // small entries cost most: the table holds about 500
		s.frame(frameHeaders, flagEndHeaders|flagEndStream, uint32(2*i+3), "\x82\x87\x84\x01\x03api"+strings.Repeat("\x40\x01a\x00", http1.FieldsMax))
	}
	for i := range openMax {
		s.frame(frameHeaders, flagEndHeaders, uint32(2*i+101), "\x83\x87\x84\x01\x03api")
	}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	var kept []*Client
	for range clients {
		client := NewClient()
		for b := s.Bytes(); len(b) > 0; {
			n, _, err := client.Next(b)
			if err != nil {
				t.Fatal(err)
			}
			b = b[n:]
		}
		kept = append(kept, client)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if each := (int64(after.HeapAlloc) - int64(before.HeapAlloc)) / int64(len(kept)); each > bound {
		t.Errorf("%d bytes a connection, at most %d", each, bound)
	}
	runtime.KeepAlive(kept)
}
