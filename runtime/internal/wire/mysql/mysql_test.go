package mysql

import (
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"testing"

	"kalium.dev/kalium/runtime/internal/policy"
	"kalium.dev/kalium/runtime/internal/wire"
)

// packet puts the protocol's header before a payload.
func packet(sequence byte, payload ...byte) []byte {
	n := len(payload)
	return append([]byte{byte(n), byte(n >> 8), byte(n >> 16), sequence}, payload...)
}

func query(text string) []byte { return packet(0, append([]byte{comQuery}, text...)...) }

// response describes a handshake response; build writes it, whatever it says.
type response struct {
	flags      uint32
	collation  byte
	filler     [23]byte
	user       string
	auth       []byte
	schema     string
	plugin     string
	attributes []byte // nil: no block at all
	tail       []byte
}

// of is what PyMySQL sends: its flags, utf8mb4, a scramble of 20 bytes, attributes.
func of(change func(*response)) response {
	r := response{
		flags:     requiredCapabilities | clientLongPassword | clientLongFlag | clientTransactions | clientMultiResults | clientLenencAuth | clientConnectAttrs,
		collation: 45, user: "kalium", auth: make([]byte, 20), schema: "helloRetail", plugin: "mysql_native_password",
		attributes: block("_client_name", "pymysql", "_pid", "17"),
	}
	if change != nil {
		change(&r)
	}
	return r
}

func block(texts ...string) []byte {
	var pairs []byte
	for _, text := range texts {
		pairs = append(append(pairs, byte(len(text))), text...)
	}
	return append([]byte{byte(len(pairs))}, pairs...)
}

func (r response) build() []byte {
	p := binary.LittleEndian.AppendUint32(nil, r.flags)
	p = binary.LittleEndian.AppendUint32(p, 1<<24-1)
	p = append(p, r.collation)
	p = append(p, r.filler[:]...)
	p = append(append(p, r.user...), 0)
	p = append(append(p, byte(len(r.auth))), r.auth...)
	p = append(append(p, r.schema...), 0)
	p = append(append(p, r.plugin...), 0)
	p = append(append(p, r.attributes...), r.tail...)
	return packet(1, p...)
}

// connected is a client behind its handshake.
func connected(t testing.TB) *Client {
	t.Helper()
	c := NewClient("helloRetail")
	data := of(nil).build()
	if n, u, err := c.Next(data); n != len(data) || u.Kind != Support || err != nil {
		t.Fatalf("%d bytes, %#v, %v", n, u, err)
	}
	return c
}

func TestAConnectionIsFollowed(t *testing.T) {
	stream := slices.Concat(
		of(nil).build(), packet(3, make([]byte, 20)...), packet(5), query("SHOW TABLES"), query("SELECT a FROM t WHERE b = 'x'"),
		packet(0, comPing), packet(0, comResetConnection), packet(0, comQuit),
	)
	want := []Unit{
		{Kind: Support, Text: "mysql handshake helloRetail"}, {Kind: Support, Text: "mysql authentication"}, {Kind: Support, Text: "mysql authentication"},
		{Kind: Message, Verb: "show-tables"}, {Kind: Message, Verb: "select", Read: []string{"t"}},
		{Kind: Support, Text: "mysql ping"}, {Kind: Support, Text: "mysql reset connection"}, {Kind: Support, Text: "mysql quit"},
	}
	for size := 1; size <= len(stream); size++ {
		c := NewClient("helloRetail")
		var held []byte
		var got []Unit
		for piece := range slices.Chunk(stream, size) {
			held = append(held, piece...)
			for {
				n, u, err := c.Next(held)
				if err == wire.ErrShort {
					break
				}
				if err != nil {
					t.Fatalf("in pieces of %d, unit %d: %v", size, len(got), err)
				}
				held = held[n:]
				got = append(got, u)
				if len(held) == 0 {
					break
				}
			}
		}
		if len(got) != len(want) || len(held) != 0 {
			t.Fatalf("in pieces of %d: %d units, %d bytes are held", size, len(got), len(held))
		}
		for i := range want {
			if got[i].Kind != want[i].Kind || got[i].Verb != want[i].Verb || !slices.Equal(got[i].Read, want[i].Read) ||
				want[i].Kind == Support && got[i].Text != want[i].Text || len(got[i].Write) != 0 {
				t.Errorf("in pieces of %d, unit %d: %#v", size, i, got[i])
			}
		}
	}
}

func TestHandshakesOfClientsPass(t *testing.T) {
	for name, change := range map[string]func(*response){
		"PyMySQL":            nil,
		"no password":        func(r *response) { r.auth = nil },
		"a longer scramble":  func(r *response) { r.auth, r.plugin = make([]byte, 32), "caching_sha2_password" },
		"utf8mb4 of MySQL 8": func(r *response) { r.collation = 255 },
		"latin1":             func(r *response) { r.collation = 8 },
		"binary":             func(r *response) { r.collation = 63 },
		"without attributes": func(r *response) { r.flags, r.attributes = r.flags&^clientConnectAttrs, nil },
		"empty attributes":   func(r *response) { r.attributes = []byte{0} },
		"attributes of more than 250 bytes": func(r *response) {
			value := strings.Repeat("v", 200)
			pairs := append(append([]byte{1, 'a', 200}, value...), append([]byte{1, 'b', 200}, value...)...)
			r.attributes = append([]byte{0xfc, byte(len(pairs)), byte(len(pairs) >> 8)}, pairs...)
		},
	} {
		data := of(change).build()
		if n, u, err := NewClient("helloRetail").Next(data); n != len(data) || u.Kind != Support || err != nil {
			t.Errorf("%s: %d of %d bytes, %#v, %v", name, n, len(data), u, err)
		}
	}
}

func TestAHandshakeThatChangesTheProtocolIsRefused(t *testing.T) {
	flag := func(flag uint32) func(*response) { return func(r *response) { r.flags |= flag } }
	without := func(flag uint32) func(*response) { return func(r *response) { r.flags &^= flag } }
	for name, c := range map[string]struct {
		change func(*response)
		reason policy.Reason
	}{
		"TLS":                         {flag(clientSSL), "unsupported"},
		"compression":                 {flag(1 << 5), "unsupported"},
		"metadata left out":           {flag(1 << 25), "unsupported"},
		"zstd":                        {flag(1 << 26), "unsupported"},
		"certificates of the server":  {flag(1 << 30), "unsupported"},
		"remember":                    {flag(1 << 31), "unsupported"},
		"no schema":                   {without(clientConnectWithDB), "unsupported"},
		"the old protocol":            {without(clientProtocol41), "unsupported"},
		"the old password":            {without(clientSecure), "unsupported"},
		"no plugin":                   {without(clientPluginAuth), "unsupported"},
		"another schema":              {func(r *response) { r.schema = "mysql" }, "unsupported"},
		"the schema in other letters": {func(r *response) { r.schema = "helloretail" }, "unsupported"},
		"an empty schema":             {func(r *response) { r.schema = "" }, "unsupported"},
		"MariaDB's flags of a MySQL":  {func(r *response) { r.filler[19] = 4 }, "unsupported"},
		"MariaDB's COM_MULTI":         {func(r *response) { r.flags, r.filler[19] = r.flags&^clientLongPassword, 2 }, "unsupported"},
		"a filler that is not zero":   {func(r *response) { r.filler[0] = 1 }, "unsupported"},
		"gbk":                         {func(r *response) { r.collation = 28 }, "unsupported"},
		"sjis":                        {func(r *response) { r.collation = 13 }, "unsupported"},
		"big5":                        {func(r *response) { r.collation = 1 }, "unsupported"},
		"ucs2":                        {func(r *response) { r.collation = 35 }, "unsupported"},
		"utf8mb3":                     {func(r *response) { r.collation = 33 }, "unsupported"},
		"collation 0":                 {func(r *response) { r.collation = 0 }, "unsupported"},
		"bytes behind":                {func(r *response) { r.tail = []byte{0} }, "malformed"},
		"attributes nobody announced": {without(clientConnectAttrs), "malformed"},
		"attributes missing":          {func(r *response) { r.attributes = nil }, "malformed"},
		"attributes cut":              {func(r *response) { r.attributes = []byte{9, 1, 'a'} }, "malformed"},
		"attributes shorter":          {func(r *response) { r.attributes = append(block("a", "b"), 1, 'c') }, "malformed"},
		"an attribute too long":       {func(r *response) { r.attributes = []byte{2, 9, 'a'} }, "malformed"},
		"an attribute without value":  {func(r *response) { r.attributes = block("a") }, "malformed"},
		"attributes of 16 MiB":        {func(r *response) { r.attributes = []byte{0xfd, 0, 0, 1} }, "malformed"},
		"a user of 129 bytes":         {func(r *response) { r.user = strings.Repeat("u", 129) }, "malformed"},
		"a password of 251 bytes":     {func(r *response) { r.auth = make([]byte, 251) }, "malformed"},
		"a plugin of 65 bytes":        {func(r *response) { r.plugin = strings.Repeat("p", 65) }, "malformed"},
		"a handshake of 4097 bytes":   {func(r *response) { r.tail = make([]byte, handshakeBytesMax) }, "too_large"},
	} {
		n, u, err := NewClient("helloRetail").Next(of(c.change).build())

		var refused *wire.Error
		if n != 0 || u.Kind != 0 || !errors.As(err, &refused) || refused.Reason != c.reason {
			t.Errorf("%s: %d bytes, %#v, %v; want %s", name, n, u, err, c.reason)
		}
	}
}

func TestFlagsThatChangeCommandsAreCleared(t *testing.T) {
	for name, flag := range map[string]uint32{
		"files of the client": clientLocalFiles, "many statements": clientMultiStatements, "spaces before parentheses": clientIgnoreSpace,
		"attributes of queries": clientQueryAttributes, "a second factor": clientMultiFactor, "all of them": clearedCapabilities,
	} {
		data := of(func(r *response) { r.flags |= flag }).build()
		client := NewClient("helloRetail")

		n, _, err := client.Next(data)

		if err != nil || n != len(data) || !slices.Equal(data, of(nil).build()) {
			t.Errorf("%s: %v, sent is %x", name, err, data)
		}
		// What the client hoped for is refused by its command.
		for what, text := range map[string]string{
			"attributes of a query": "\x00\x01SELECT a FROM t", "two statements": "SELECT a FROM t; SELECT b FROM u", "a space": "SELECT COUNT (*) FROM t",
			"a file": "LOAD DATA LOCAL INFILE '/x' INTO TABLE t",
		} {
			if n, u, err := connected(t).Next(query(text)); err == nil || n != 0 {
				t.Errorf("%s: %s passes as %#v", name, what, u)
			}
		}
	}
}

func TestEveryCutOfAHandshakeIsRefused(t *testing.T) {
	whole := of(nil).build()[headerBytes:]
	for size := range len(whole) {
		if n, _, err := NewClient("helloRetail").Next(packet(1, whole[:size]...)); n != 0 || err == nil || err == wire.ErrShort {
			t.Errorf("%d of %d bytes: %d taken, %v", size, len(whole), n, err)
		}
	}
}

func TestSequenceNumbersTellThePhasesApart(t *testing.T) {
	for name, c := range map[string]struct {
		packets [][]byte // behind the handshake; the last one is refused
	}{
		"a handshake again":               {[][]byte{of(nil).build()}},
		"a number skipped":                {[][]byte{packet(5, 1)}},
		"the server's own number":         {[][]byte{packet(2, 1)}},
		"a number again":                  {[][]byte{packet(3, 1), packet(3, 1)}},
		"five packets to authenticate":    {[][]byte{packet(3), packet(5), packet(7), packet(9), packet(11)}},
		"a large packet to authenticate":  {[][]byte{packet(3, make([]byte, authPacketBytesMax+1)...)}},
		"authentication behind a command": {[][]byte{packet(0, comPing), packet(1, 1)}},
		"a command with number 1":         {[][]byte{packet(0, comPing), packet(1, comPing)}},
		"an empty command":                {[][]byte{packet(0)}},
		"an empty command later":          {[][]byte{packet(0, comPing), packet(0)}},
		"bytes behind the end":            {[][]byte{packet(0, comQuit), packet(0, comPing)}},
	} {
		client := connected(t)
		for i, data := range c.packets {
			n, _, err := client.Next(data)
			if last := i == len(c.packets)-1; last != (err != nil) || last != (n == 0) || err == wire.ErrShort {
				t.Errorf("%s, packet %d: %d bytes, %v", name, i, n, err)
			}
		}
		if _, _, err := client.Next(packet(0, comPing)); err == nil {
			t.Errorf("%s: the connection goes on", name)
		}
	}
	for _, first := range [][]byte{query("SELECT 1"), packet(0, of(nil).build()[headerBytes:]...), packet(2, 1), packet(1)} {
		if _, _, err := NewClient("helloRetail").Next(first); err == nil || err == wire.ErrShort {
			t.Errorf("a connection begins with %x: %v", first[:5], err)
		}
	}
}

func TestCommandsThatCannotBeJudgedAreRefused(t *testing.T) {
	for command := range 256 {
		switch byte(command) {
		case comQuery, comPing, comQuit, comResetConnection, comStmtPrepare, comStmtExecute, comStmtSendLongData, comStmtClose, comStmtReset:
			continue
		}
		_, _, err := connected(t).Next(packet(0, byte(command), 'x'))

		var refused *wire.Error
		if !errors.As(err, &refused) || refused.Reason != policy.ReasonUnsupported {
			t.Errorf("command %#02x: %v", command, err)
		}
	}
	for _, command := range []byte{comPing, comQuit, comResetConnection} {
		if _, _, err := connected(t).Next(packet(0, command, 0)); err == nil {
			t.Errorf("command %#02x with a byte behind it passes", command)
		}
	}
	for name, text := range map[string]string{
		"two statements": "SELECT a FROM t; DELETE FROM t", "an executable comment": "SELECT a FROM t /*!50000 INTO OUTFILE '/x' */",
		"a file": "LOAD DATA LOCAL INFILE '/x' INTO TABLE t", "another schema's procedure": "CALL p()", "nothing": "", "use": "USE mysql",
		"a prepared statement": "PREPARE s FROM 'DELETE FROM t'",
	} {
		if n, u, err := connected(t).Next(query(text)); err == nil || n != 0 {
			t.Errorf("%s: %#v", name, u)
		}
	}
}

func TestPacketsAreBounded(t *testing.T) {
	for name, header := range map[string][]byte{
		"a packet beyond the bound":   {1, 0, 0x10, 0},
		"a packet that goes on":       {0xff, 0xff, 0xff, 0},
		"a PROXY header":              []byte("PROXY TCP4 1.1.1.1"),
		"HTTP":                        []byte("GET / HTTP/1.1\r\n"),
		"a binary PROXY header":       {0x0d, 0x0a, 0x0d, 0x0a, 0, 0x0d, 0x0a},
		"a large packet at the start": {0, 0x20, 0, 1},
	} {
		if _, _, err := NewClient("helloRetail").Next(header); err == nil || err == wire.ErrShort {
			t.Errorf("%s: %v", name, err)
		}
	}
	client := connected(t)
	text := "INSERT INTO t VALUES ('" + strings.Repeat("x", PacketBytesMax-1-24-2) + "')"
	if n, u, err := client.Next(query(text)); err != nil || n != headerBytes+1+len(text) || u.Verb != "insert" {
		t.Errorf("a statement of %d bytes: %d taken, %#v, %v", len(text), n, u, err)
	}
}

func TestAnErrorIsFinal(t *testing.T) {
	client := connected(t)
	_, _, first := client.Next(packet(0, 0x02, 'm'))

	_, _, second := client.Next(packet(0, comPing))

	if first == nil || second != first {
		t.Errorf("%v, then %v", first, second)
	}
}
