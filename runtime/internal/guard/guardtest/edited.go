package guardtest

import (
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/policy"
)

// Sign makes the envelope of a compiled policy.
func Sign(t testing.TB, compiled string) []byte {
	t.Helper()
	document, err := json.Marshal(map[string]string{
		"format": policy.SignedFormat, "key_id": policy.KeyID(PublicKey), "policy": base64.StdEncoding.EncodeToString([]byte(compiled)),
		"signature": base64.StdEncoding.EncodeToString(ed25519.Sign(privateKey, []byte(policy.SignedFormat+"\n"+compiled))),
	})
	if err != nil {
		t.Fatal(err)
	}
	return document
}

// Parts of the policy that tests replace.
const (
	Inflight     = `"max_inflight":1`
	Reuse        = `"reuse":"always"`
	Quiet        = `"quiet_ms":200`
	Retire       = `"retire_ms":30000`
	TailTime     = `"tail_ms":10000`
	Timeout      = `"invocation_timeout_ms":60000`
	RetriesOfGet = `"query":[],"retries":0,"tail":false,"text":"http GET api /a"`
)

// Startup is a startup that may send GET /a once; it goes in front of "max_inflight".
const Startup = `"startup":{"accept":[0,1],"edges":[[0,0,1]],"start":[0],"states":2,"symbols":[
{"kind":"http","line":9,"method":"GET","path":"/a","peer":"api","grpc":false,"query":[],"retries":0,"tail":false,"text":"http GET api /a","upgrade":false}]},`

// Edited is the envelope of the policy in which parts are replaced: pairs of an old text and a new one. What is not there
// fails the test.
func Edited(t testing.TB, mode, version string, pairs ...string) []byte {
	t.Helper()
	text := strings.NewReplacer("MODE", mode, "VERSION", version, "SOURCE", strings.Repeat(version[:1], 64), "\n", "").Replace(compiled)
	for pair := range slices.Chunk(pairs, 2) {
		if !strings.Contains(text, pair[0]) {
			t.Fatalf("the policy has no %s", pair[0])
		}
		text = strings.ReplaceAll(text, pair[0], strings.ReplaceAll(pair[1], "\n", ""))
	}
	return Sign(t, text)
}

// WelcomeEdited is Welcome with the policy of Edited.
func WelcomeEdited(t testing.TB, mode string, pairs ...string) *frame.Welcome {
	welcome := Welcome(t, mode)
	welcome.Policy = Edited(t, mode, "3", pairs...)
	return welcome
}
