package guard

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"kalium.dev/kalium/runtime/internal/guard/guardtest"
)

// conversation is what a program may send on one connection, good and bad parts mixed.
func conversation(random *rand.Rand) (to, bytes string) {
	pick := func(parts ...string) string {
		var b strings.Builder
		for range 1 + random.IntN(4) {
			b.WriteString(parts[random.IntN(len(parts))])
		}
		return b.String()
	}
	switch random.IntN(3) {
	case 0:
		return api, pick(request("GET /a", "api.test:8080"), request("POST /b", "api.test:8080", "Content-Length: 5\r\n")+"12345",
			request("POST /b", "api.test:8080", "Transfer-Encoding: chunked\r\n")+"3\r\nabc\r\n0\r\n\r\n", request("GET /a", "gateway:8080"), "\x00", "GET ")
	case 1:
		return database, guardtest.LoginPacket("shop") + pick(guardtest.Packet(0, "\x0e"), guardtest.Packet(0, "\x03SELECT a FROM items"),
			guardtest.Packet(0, "\x03DROP TABLE items"), guardtest.Packet(0, "\x01"), "\x05\x00\x00")
	default:
		return images, pick(guardtest.ClientHello("images.test"), guardtest.ClientHello("elsewhere.test"), "\x14\x03\x03\x00\x01\x01", "\x17\x03\x03\x00\x05data.", "record", "\x16\x03")
	}
}

// outcomeOf writes bytes in the given pieces and renders all that can be seen of it.
func outcomeOf(t *testing.T, mode, to, bytes string, state int, piece func(left int) int) string {
	g, c, _ := invoked(t, mode)
	g.live.cursor = atState(g, state)
	out := connect(t, g, to)
	var sent strings.Builder
	last := Allowed
	for len(bytes) > 0 && last != Denied {
		n := piece(len(bytes))
		send, outcome := out.Write([]byte(bytes[:n]))
		sent.Write(send)
		last, bytes = outcome, bytes[n:]
	}
	held, _ := out.Held()
	text := fmt.Sprintf("sent %q, outcome %d, held %d, cursor %v", sent.String(), last, held, g.live.cursor.States())
	for _, r := range c.Verdicts() {
		text += fmt.Sprintf("\n%s %s %t %t %s", r.Kind, r.Message, r.Allowed, r.WouldDeny, r.Reason)
	}
	return text
}

// TestTheSplitOfWritesChangesNothing holds that a verdict belongs to bytes and not to the calls that brought them.
func TestTheSplitOfWritesChangesNothing(t *testing.T) {
	seed := rand.Uint64()
	random := rand.New(rand.NewPCG(seed, 1))
	for i := range 300 {
		to, bytes := conversation(random)
		mode, state := []string{"enforce", "audit"}[random.IntN(2)], random.IntN(5)
		whole := outcomeOf(t, mode, to, bytes, state, func(left int) int { return left })

		split := outcomeOf(t, mode, to, bytes, state, func(left int) int { return 1 + random.IntN(min(left, 1+random.IntN(40))) })

		if split != whole {
			t.Fatalf("seed %d, conversation %d, %s, %q\nwhole: %s\nsplit: %s", seed, i, mode, bytes, whole, split)
		}
	}
}
