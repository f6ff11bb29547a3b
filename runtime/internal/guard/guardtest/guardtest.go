// Package guardtest holds what tests of the guard and of the endpoints around it share: a signed policy, and a controller
// that answers as a test says.
package guardtest

import (
	"bytes"
	"crypto/ed25519"
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
)

// buyer's CFG: GET /a, then a select, then an invoke of payer, and a POST /b after that. In the first state it may also
// get images, and before the POST put them, open a WebSocket and make calls of gRPC.
const compiled = `{"app":"shop","app_cfg":{"buyer":{"edges":[[0,0,1]],
"labels":[{"asynchronous":false,"callback":"","callee":"payer","join":0,"retries":0}],"start":[0],"states":2},
"payer":{"edges":[],"labels":[],"start":[0],"states":1}},
"entries":["buyer"],"format":"kalium-compiled/v3","functions":{"buyer":{"accept":[4],
"edges":[[0,0,1],[0,3,0],[1,1,2],[2,2,3],[3,4,4],[3,5,3],[3,6,3],[3,7,3]],"invocation_timeout_ms":60000,"max_body":100,"max_inflight":1,"mode":"MODE",
"quiet_ms":200,"retire_ms":30000,"reuse":"always","start":[0],"states":5,"symbols":[
{"kind":"http","line":1,"method":"GET","path":"/a","peer":"api","grpc":false,"query":[],"retries":0,"tail":false,
"text":"http GET api /a","upgrade":false},
{"kind":"mysql","line":2,"peer":"database","read":["items"],"tail":false,"text":"mysql select read items","verb":"select","write":[]},
{"asynchronous":false,"callback":"","callee":"payer","kind":"invoke","line":3,"retries":0,"peer":"gateway","tail":false,"text":"invoke payer"},
{"kind":"https","line":4,"method":"GET","path":"/i","peer":"images","grpc":false,"query":[],"retries":0,"tail":false,
"text":"https GET images /i","upgrade":false},
{"kind":"http","line":5,"method":"POST","path":"/b","peer":"api","grpc":false,"query":[],"retries":0,"tail":false,
"text":"http POST api /b","upgrade":false},
{"kind":"https","line":6,"method":"PUT","path":"/p","peer":"images","grpc":false,"query":[],"retries":0,"tail":false,
"text":"https PUT images /p","upgrade":false},
{"kind":"http","line":7,"method":"GET","path":"/w","peer":"api","grpc":false,"query":[],"retries":0,"tail":false,
"text":"http GET api /w websocket","upgrade":true},
{"kind":"https","line":8,"method":"POST","path":"/g","peer":"images","grpc":true,"query":[],"retries":0,"tail":false,
"text":"https POST images /g grpc","upgrade":false}],
"tail_ms":10000,"tls":"open"},
"payer":{"accept":[0],"edges":[],"invocation_timeout_ms":60000,"max_body":100,"max_inflight":1,"mode":"MODE",
"quiet_ms":200,"retire_ms":30000,"reuse":"always","start":[0],"states":1,"symbols":[],"tail_ms":10000,"tls":"open"}},
"mode":"MODE","on_unavailable":{"app_edge":"deny","deadline_ms":250},"peers":{
"api":{"host":"api.test","port":8080,"protocol":"http"},"database":{"host":"database","port":3306,"protocol":"mysql","schema":"shop"},
"gateway":{"host":"gateway","port":8080,"protocol":"http","role":"gateway"},
"images":{"host":"images.test","port":4443,"protocol":"https"},
"names":{"host":"images.other","port":4443,"protocol":"https"}},"source_sha256":"SOURCE","version":VERSION}`

// HostAddress is where all peers of the policy are, and where invocations come from.
const HostAddress = "10.137.0.1"

// App and Function are whom the policy is for.
const (
	App      = "shop"
	Function = "buyer"
)

var privateKey = ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))

// PublicKey verifies what Signed signs.
var PublicKey = privateKey.Public().(ed25519.PublicKey)

// Signed is the envelope of the policy in a mode and version.
func Signed(t testing.TB, mode string, version string) []byte {
	t.Helper()
	return Edited(t, mode, version)
}

// Controller answers as the test says and keeps what it was told.
type Controller struct {
	OnStart  func(*frame.Start) (*frame.Answer, error)
	OnInvoke func(*frame.Invoke) (*frame.Answer, error)
	OnLog    func(*frame.VerdictRecord) // nil: nothing more than to keep it
	OnEnd    func(*frame.End)           // the same
	OnFinish func(*frame.Finish) (*frame.Answer, error)

	mu      sync.Mutex
	stuck   bool
	records []frame.VerdictRecord
	ends    []frame.End
	starts  []frame.Start
	modes   []frame.Mode
}

// Start implements guard.Controller.
func (c *Controller) Start(_ time.Time, m *frame.Start) (*frame.Answer, error) {
	c.mu.Lock()
	c.starts = append(c.starts, *m)
	c.mu.Unlock()
	return c.OnStart(m)
}

// Invoke implements guard.Controller.
func (c *Controller) Invoke(_ time.Time, m *frame.Invoke) (*frame.Answer, error) {
	return c.OnInvoke(m)
}

// End implements guard.Controller.
func (c *Controller) End(m *frame.End) {
	if c.OnEnd != nil {
		c.OnEnd(m)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ends = append(c.ends, *m)
}

// Finish implements guard.Controller.
func (c *Controller) Finish(_ time.Time, m *frame.Finish) (*frame.Answer, error) {
	return c.OnFinish(m)
}

// Mode implements guard.Controller.
func (c *Controller) Mode(m *frame.Mode) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.modes = append(c.modes, *m)
}

// Modes lists what was told of the mode in force.
func (c *Controller) Modes() []frame.Mode {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]frame.Mode(nil), c.modes...)
}

// Log implements guard.Controller.
func (c *Controller) Log(_ time.Time, r *frame.VerdictRecord) error {
	if c.OnLog != nil {
		c.OnLog(r)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stuck {
		return errors.New("the queue is full")
	}
	kept := *r
	kept.Expected, kept.States = slices.Clone(r.Expected), slices.Clone(r.States)
	c.records = append(c.records, kept)
	return nil
}

// Verdicts lists what was logged.
func (c *Controller) Verdicts() []frame.VerdictRecord { return c.Since(0) }

// Since lists what was logged after the first n verdicts.
func (c *Controller) Since(n int) []frame.VerdictRecord {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]frame.VerdictRecord(nil), c.records[n:]...)
}

// Last is the newest verdict; the test fails without one.
func (c *Controller) Last(t testing.TB) frame.VerdictRecord {
	t.Helper()
	records := c.Verdicts()
	if len(records) == 0 {
		t.Fatal("no verdict was logged")
	}
	return records[len(records)-1]
}

// Ended lists the invocations that are over.
func (c *Controller) Ended() []frame.End {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]frame.End(nil), c.ends...)
}

// What a Controller grants.
const (
	Call       = "0123456789abcdef0123456789abcdef"
	Invocation = "fedcba9876543210fedcba9876543210"
	Token      = "00112233445566778899aabbccddeeff"
)

// GrantStart grants every start.
func GrantStart(*frame.Start) (*frame.Answer, error) {
	return &frame.Answer{Allowed: true, Reason: "allowed", Call: Call, Invocation: Invocation}, nil
}

// GrantInvoke grants every invoke.
func GrantInvoke(*frame.Invoke) (*frame.Answer, error) {
	return &frame.Answer{Allowed: true, Reason: "allowed", Token: Token}, nil
}

// GrantFinish acknowledges every end.
func GrantFinish(*frame.Finish) (*frame.Answer, error) {
	return &frame.Answer{Allowed: true, Reason: "allowed"}, nil
}

// Welcome is what an agent says that has the policy.
func Welcome(t testing.TB, mode string) *frame.Welcome {
	return &frame.Welcome{
		OK: true, Proto: frame.Protos()[0], Policy: Signed(t, mode, "3"), LeaseMS: 60000, Port: 8080, Sources: []string{"10.137.0.1/32"}, HealthPath: "/_/health",
		Names: map[string][]string{
			"api.test": {HostAddress}, "gateway": {HostAddress}, "database": {HostAddress}, "images.test": {HostAddress}, "images.other": {HostAddress},
		},
	}
}

// NewController grants everything.
func NewController() *Controller {
	return &Controller{OnStart: GrantStart, OnInvoke: GrantInvoke, OnFinish: GrantFinish}
}

// Stick makes the log refuse verdicts.
func (c *Controller) Stick() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stuck = true
}

// Started lists the starts that were asked for.
func (c *Controller) Started() []frame.Start {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]frame.Start(nil), c.starts...)
}

// ClientHello is a TLS 1.3 hello of the least size for one name, with further extensions in their wire form.
func ClientHello(name string, extensions ...string) string {
	vector := func(s string) string { return string([]byte{byte(len(s) >> 8), byte(len(s))}) + s }
	list := "\x00\x00" + vector(vector("\x00"+vector(name)))
	list += strings.Join(extensions, "")
	body := "\x03\x03" + strings.Repeat("r", 32) + "\x00" + vector("\x13\x01") + "\x01\x00" + vector(list)
	message := "\x01" + string([]byte{0, byte(len(body) >> 8), byte(len(body))}) + body
	return "\x16\x03\x01" + vector(message)
}

// Packet frames a MySQL payload.
func Packet(sequence byte, payload string) string {
	n := len(payload)
	return string([]byte{byte(n), byte(n >> 8), byte(n >> 16), sequence}) + payload
}

// LoginPacket is Protocol::HandshakeResponse41 as PyMySQL sends it.
func LoginPacket(schema string) string {
	var b bytes.Buffer
	binary.Write(&b, binary.LittleEndian, uint32(1<<0|1<<2|1<<3|1<<9|1<<13|1<<15|1<<17|1<<19))
	binary.Write(&b, binary.LittleEndian, uint32(1<<24))
	b.WriteByte(45)
	b.Write(make([]byte, 23))
	b.WriteString("user\x00\x02ab" + schema + "\x00mysql_native_password\x00")
	return Packet(1, b.String())
}
