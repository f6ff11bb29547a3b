package smtp

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"kalium.dev/kalium/runtime/internal/policy"
	"kalium.dev/kalium/runtime/internal/wire"
)

// talk plays a dialogue: lines that begin with "S:" are the server's, others the client's, and a last one that begins with
// "!" has to be refused. It returns the client's units.
func talk(t testing.TB, dialogue ...string) (c *Client, units []Unit, refused *wire.Error) {
	t.Helper()
	c = NewClient()
	for i, line := range dialogue {
		if said, isServer := strings.CutPrefix(line, "S:"); isServer {
			c.Server([]byte(said))
			continue
		}
		line, isLast := strings.CutPrefix(line, "!")
		for b := []byte(line); len(b) > 0; {
			n, u, err := c.Next(b)
			if err != nil {
				if !errors.As(err, &refused) || n != 0 || !isLast || i != len(dialogue)-1 {
					t.Errorf("%q: %d bytes, %v", b, n, err)
				}
				return c, units, refused
			}
			units, b = append(units, u), b[n:]
		}
	}
	return c, units, nil
}

const greeting, ok = "S:220 mail ESMTP\r\n", "S:250 ok\r\n"

// begun is a dialogue up to a recipient.
var begun = []string{greeting, "EHLO f\r\n", "S:250-mail\r\n250-PIPELINING\r\n250 CHUNKING\r\n", "MAIL FROM:<a@x>\r\n", ok, "RCPT TO:<b@x>\r\n", ok}

func with(dialogue []string, more ...string) []string { return append(slices.Clone(dialogue), more...) }

func TestAMailIsFollowed(t *testing.T) {
	_, units, _ := talk(t, greeting, "ehlo [127.0.0.1]\r\n", "S:250-mail\r\n250 HELP\r\n", "mail FROM:<A.b@Shop.Example> size=12\r\n", ok,
		"rcpt TO:<Cust@X>\r\n", ok, "rcpt TO:<B@Y.example>\r\n", ok, "data\r\n", "S:354 go on\r\n", "Subject: x\r\n\r\n..dots\r\n.\r\n", ok, "rset\r\n", ok, "noop\r\n", ok, "quit\r\n")

	want := []Unit{
		{Kind: Support, Text: "smtp ehlo"},
		{Kind: Envelope, Text: "smtp envelope from A.b@shop.example", From: "A.b@shop.example"},
		{Kind: Envelope, Text: "smtp envelope from A.b@shop.example to Cust@x", From: "A.b@shop.example", To: []string{"Cust@x"}},
		{Kind: Envelope, Text: "smtp envelope from A.b@shop.example to B@y.example,Cust@x", From: "A.b@shop.example", To: []string{"B@y.example", "Cust@x"}},
		{Kind: Mail, Text: "smtp mail from A.b@shop.example to B@y.example,Cust@x", From: "A.b@shop.example", To: []string{"B@y.example", "Cust@x"}},
		{Kind: Body, Text: "smtp text", Bytes: 22, End: true},
		{Kind: Support, Text: "smtp rset"}, {Kind: Support, Text: "smtp noop"}, {Kind: Support, Text: "smtp quit"},
	}
	if !slices.EqualFunc(units, want, equal) {
		t.Errorf("got  %#v\nwant %#v", units, want)
	}
}

func equal(a, b Unit) bool {
	return a.Kind == b.Kind && a.Text == b.Text && a.From == b.From && slices.Equal(a.To, b.To) && a.Bytes == b.Bytes && a.End == b.End
}

func TestStartTLSWaitsForItsReply(t *testing.T) {
	hello := []string{greeting, "EHLO f\r\n", "S:250-mail\r\n250 STARTTLS\r\n"}
	for name, c := range map[string]struct {
		dialogue []string
		inTLS    bool
		refused  policy.Reason
	}{
		"taken":                         {with(hello, "STARTTLS\r\n", "S:220 go\r\n", "EHLO f\r\n", "MAIL FROM:<a@x>\r\n"), true, ""},
		"taken by several lines":        {with(hello, "STARTTLS\r\n", "S:220-go\r\n", "S:220 on\r\n"), true, ""},
		"refused":                       {with(hello, "STARTTLS\r\n", "S:454 no\r\n", "MAIL FROM:<a@x>\r\n"), false, ""},
		"another good reply":            {with(hello, "STARTTLS\r\n", "S:250 no\r\n", "MAIL FROM:<a@x>\r\n"), false, ""},
		"a hello before the reply":      {with(hello, "STARTTLS\r\n", "!\x16\x03\x01"), false, policy.ReasonMalformed},
		"a hello in the same write":     {with(hello, "!STARTTLS\r\n\x16\x03\x01"), false, policy.ReasonMalformed},
		"a hello before the reply ends": {with(hello, "STARTTLS\r\n", "S:220-go\r\n", "!\x16\x03\x01"), false, policy.ReasonMalformed},
		"a hello behind a refusal":      {with(hello, "STARTTLS\r\n", "S:500 what\r\n", "!\x16\x03\x01\r\n"), false, policy.ReasonMalformed},
		"before another reply":          {with(hello, "NOOP\r\n", "!STARTTLS\r\n"), false, policy.ReasonMalformed},
		"before the greeting":           {[]string{"!STARTTLS\r\n"}, false, policy.ReasonMalformed},
		"inside TLS":                    {with(hello, "STARTTLS\r\n", "S:220 go\r\n", "!STARTTLS\r\n"), true, policy.ReasonUnsupported},
		"inside a mail":                 {with(begun, "!STARTTLS\r\n"), false, policy.ReasonMalformed},
	} {
		client, _, refused := talk(t, c.dialogue...)

		if client.InTLS() != c.inTLS || (refused == nil) != (c.refused == "") || refused != nil && refused.Reason != c.refused {
			t.Errorf("%s: in TLS %v, %v", name, client.InTLS(), refused)
		}
	}
}
