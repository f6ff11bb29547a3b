package smtp

import (
	"slices"
	"strings"
	"testing"

	"kalium.dev/kalium/runtime/internal/policy"
)

const (
	malformed   = policy.ReasonMalformed
	unsupported = policy.ReasonUnsupported
	tooLarge    = policy.ReasonTooLarge
)

// inside is a dialogue up to a recipient inside TLS.
var inside = []string{greeting, "EHLO f\r\n", "S:250-mail\r\n250 STARTTLS\r\n", "STARTTLS\r\n", "S:220 go\r\n", "EHLO f\r\n", "MAIL FROM:<a@x>\r\n", "RCPT TO:<b@x>\r\n"}

// texting is a dialogue in clear up to the text of a mail.
var texting = with(begun, "DATA\r\n", "S:354 go on\r\n")

type refusal struct {
	dialogue []string
	reason   policy.Reason // "" when it passes
}

func judge(t *testing.T, cases map[string]refusal) {
	t.Helper()
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			client, _, refused := talk(t, c.dialogue...)
			if (refused == nil) != (c.reason == "") || refused != nil && refused.Reason != c.reason {
				t.Errorf("%v, want %q", refused, c.reason)
			}
			if refused == nil {
				return
			}
			if n, _, err := client.Next([]byte("NOOP\r\n")); n != 0 || err != refused {
				t.Errorf("the connection goes on: %v", err)
			}
		})
	}
}

func TestCommandsAreAClosedList(t *testing.T) {
	hello := begun[:3]
	cases := map[string]refusal{}
	for _, line := range []string{"EHLO [IPv6:2001:db8::1]", "HELO function.example", "noop", "RSET", "quit", "AUTH PLAIN AHVzZXIAcHc=", "auth login", "AUTH CRAM-MD5", "AUTH PLAIN ="} {
		cases[line] = refusal{with(hello, line+"\r\n"), ""}
	}
	for line, reason := range map[string]policy.Reason{
		"VRFY a": unsupported, "EXPN a": unsupported, "HELP": unsupported, "ETRN a": unsupported, "TURN": unsupported, "ATRN a": unsupported,
		"SEND FROM:<a@x>": unsupported, "SOML FROM:<a@x>": unsupported, "SAML FROM:<a@x>": unsupported, "XCLIENT NAME=x": unsupported, "BURL x": unsupported,
		"XYZ": unsupported, "": unsupported, " NOOP": unsupported, "MAILFROM:<a@x>": unsupported, "MAIL\x0bFROM:<a@x>": malformed, "GET / HTTP/1.1": unsupported,
		"NOOP x": malformed, "NOOP ": malformed, "RSET x": malformed, "QUIT x": malformed, "DATA x": malformed, "STARTTLS x": malformed,
		"EHLO": malformed, "EHLO ": malformed, "EHLO a b": malformed, "EHLO a<b>": malformed, "HELO " + strings.Repeat("a", 256): malformed,
		"AUTH": unsupported, "AUTH XOAUTH2 x": unsupported, "AUTH PLAIN ": malformed, "AUTH PLAIN a b": malformed, "AUTH PLAIN a;b": malformed, "AUTH PLAIN ===": malformed,
		"NOOP\n": malformed, "NO\x00OP": malformed, "NOOP\r": malformed, "N\xc3\xb6OP": malformed, "NOOP\r\rNOOP": malformed,
		"RCPT TO:<b@x>": malformed, "DATA": malformed, "BDAT 1 LAST": malformed, "EHLO " + strings.Repeat("a", commandBytesMax): tooLarge, strings.Repeat("a", 2000): tooLarge,
	} {
		cases[line] = refusal{with(hello, "!"+line+"\r\n"), reason}
	}
	judge(t, cases)
}

func TestOrderOfCommands(t *testing.T) {
	judge(t, map[string]refusal{
		"before the greeting":            {[]string{"!EHLO f\r\n"}, malformed},
		"before the end of the greeting": {[]string{"S:220-mail\r\n", "!EHLO f\r\n"}, malformed},
		"without a hello":                {[]string{greeting, "MAIL FROM:<a@x>\r\n"}, ""},
		"a mail inside a mail":           {with(begun, "!MAIL FROM:<c@x>\r\n"), malformed},
		"a hello inside a mail":          {with(begun, "!EHLO f\r\n"), malformed},
		"AUTH inside a mail":             {with(begun, "!AUTH LOGIN\r\n"), unsupported},
		"a mail behind RSET":             {with(begun, "RSET\r\n", ok, "MAIL FROM:<c@x>\r\n"), ""},
		"DATA behind RSET":               {with(begun, "RSET\r\n", ok, "!DATA\r\n"), malformed},
		"DATA without a recipient":       {with(begun[:5], "!DATA\r\n"), malformed},
		"a mail behind a refused one":    {with(begun[:4], "S:550 no\r\n", "MAIL FROM:<c@x>\r\n"), ""},
		"a recipient behind it":          {with(begun[:4], "S:550 no\r\n", "!RCPT TO:<b@x>\r\n"), malformed},
		"a mail before a refusal":        {with(begun[:4], "RSET\r\n", "MAIL FROM:<c@x>\r\n", "S:550 no\r\n", "RCPT TO:<b@x>\r\n"), ""},
		"behind QUIT":                    {with(begun, "QUIT\r\n", "!NOOP\r\n"), malformed},
		"text before 354":                {with(begun, "DATA\r\n", "!x\r\n"), malformed},
		"text in the write of DATA":      {with(begun, "!DATA\r\nx\r\n"), malformed},
		"DATA is refused":                {with(begun, "DATA\r\n", "S:554 no\r\n", "RSET\r\n"), ""},
		"DATA is refused, text comes":    {with(begun, "DATA\r\n", "S:554 no\r\n", "!x\r\n"), unsupported},
		"DATA is refused, and again":     {with(begun, "DATA\r\n", "S:451 no\r\n", "DATA\r\n", "S:354 go on\r\n", "x\r\n.\r\n"), ""},
		"DATA is refused, then a mail":   {with(begun, "DATA\r\n", "S:451 no\r\n", "!MAIL FROM:<a@x>\r\n"), malformed},
		// The server held an older envelope, so the text would go to its recipients.
		"MAIL is refused, DATA is not": {with(begun[:3], "MAIL FROM:<a@x>\r\nRCPT TO:<b@x>\r\nDATA\r\n", "S:503 nested\r\n", ok, "S:354 go on\r\n", "!x\r\n"), unsupported},
		"MAIL and DATA are refused":    {with(begun[:3], "MAIL FROM:<a@x>\r\nRCPT TO:<b@x>\r\nDATA\r\n", "S:550 no\r\n", "S:503 no\r\n", "S:503 no\r\n", "MAIL FROM:<c@x>\r\n"), ""},
		"RSET is refused":              {with(begun, "RSET\r\n", "S:500 no\r\n", "!MAIL FROM:<c@x>\r\n"), unsupported},
		"a reply too many":             {with(begun, "S:250 ok\r\n", "!DATA\r\n"), unsupported},
		"a reply too many, then QUIT":  {with(begun, "S:421 bye\r\n", "QUIT\r\n"), ""},
		"a reply that is none":         {with(begun, "S:hello\r\n", "!DATA\r\n"), unsupported},
		"a reply with a strange code":  {with(begun, "S:2x0 ok\r\n", "!DATA\r\n"), unsupported},
		"a line of a reply too long":   {with(begun, "S:250-"+strings.Repeat("x", replyLineMax)+"\r\n", "!DATA\r\n"), unsupported},
		"replies with bare LF":         {[]string{"S:220 mail\n", "MAIL FROM:<a@x>\r\n", "S:250\n", "RCPT TO:<b@x>\r\n", "S:250 ok\n", "DATA\r\n", "S:354 go\n", "x\r\n.\r\n"}, ""},
		"128 commands without a reply": {append(slices.Clone(begun[:1]), slices.Repeat([]string{"NOOP\r\n"}, commandsMax)...), ""},
		"129 commands without a reply": {append(append(slices.Clone(begun[:1]), slices.Repeat([]string{"NOOP\r\n"}, commandsMax)...), "!NOOP\r\n"), tooLarge},
		"128 replies, 128 commands":    {append(append(append(slices.Clone(begun[:1]), slices.Repeat([]string{"NOOP\r\n"}, commandsMax)...), slices.Repeat([]string{ok}, commandsMax)...), slices.Repeat([]string{"NOOP\r\n"}, commandsMax)...), ""},
	})
}

func TestAddressesAreStrict(t *testing.T) {
	sender, recipient := begun[:3], begun[:5]
	cases := map[string]refusal{}
	for _, args := range []string{"<a@x>", "<a.b-c_d+e=f@shop-1.hello.test>", "<a@x> SIZE=1", "<a@x> body=8bitmime size=99999999999999999999", "<a@x> BODY=7BIT", "<" + strings.Repeat("l", 64) + "@x>"} {
		cases["MAIL FROM:"+args] = refusal{with(sender, "MAIL FROM:"+args+"\r\n"), ""}
	}
	for args, reason := range map[string]policy.Reason{
		"FROM: <a@x>": malformed, "FROM <a@x>": malformed, "FROM:a@x": malformed, "FROM:<a@x": malformed, "TO:<a@x>": malformed, "<a@x>": malformed, "": malformed,
		"FROM:<>": unsupported, "FROM:<a>": unsupported, "FROM:<@x>": unsupported, "FROM:<a@>": malformed, "FROM:<\"a b\"@x>": unsupported, "FROM:<@y,@z:a@x>": unsupported, "FROM:<@y:a@x>": unsupported,
		"FROM:<a@[127.0.0.1]>": unsupported, "FROM:<a@[IPv6:::1]>": unsupported, "FROM:<a%y@x>": unsupported, "FROM:<y!a@x>": unsupported, "FROM:<|sh@x>": unsupported, "FROM:</etc/x@x>": unsupported, "FROM:<`a`@x>": unsupported,
		"FROM:<a..b@x>": malformed, "FROM:<.a@x>": malformed, "FROM:<a.@x>": malformed, "FROM:<a b@x>": unsupported, "FROM:<a@b@x>": malformed, "FROM:<a@x.>": malformed, "FROM:<a@.x>": malformed, "FROM:<a@x..y>": malformed,
		"FROM:<a@-x>": malformed, "FROM:<a@x->": malformed, "FROM:<a@x_y>": malformed, "FROM:<a\\@b@x>": unsupported, "FROM:<<a@x>": unsupported, "FROM:<a@x>>": malformed, "FROM:<a(c)@x>": unsupported, "FROM:<a,b@x>": unsupported,
		"FROM:<a@" + strings.Repeat("x", 64) + ">": malformed, "FROM:<" + strings.Repeat("l", 65) + "@x>": tooLarge, "FROM:<a@" + strings.Repeat("x.", 130) + "x>": tooLarge,
		"FROM:<a@x>SIZE=1": malformed, "FROM:<a@x> ": malformed, "FROM:<a@x>  SIZE=1": unsupported, "FROM:<a@x> SIZE=": malformed, "FROM:<a@x> SIZE=x": malformed, "FROM:<a@x> SIZE=1 SIZE=1": malformed, "FROM:<a@x> SIZE=" + strings.Repeat("1", 21): malformed,
		"FROM:<a@x> BODY=BINARYMIME": unsupported, "FROM:<a@x> SMTPUTF8": unsupported, "FROM:<a@x> AUTH=<>": unsupported, "FROM:<a@x> RET=FULL": unsupported, "FROM:<a@x> SIZE=1 ": unsupported, "FROM:<a@x> <b@x>": unsupported,
	} {
		cases["MAIL "+args] = refusal{with(sender, "!MAIL "+args+"\r\n"), reason}
		if rest, isFrom := strings.CutPrefix(args, "FROM:"); isFrom {
			if strings.Contains(rest, "> ") && rest != "<a@x> " {
				reason = unsupported // no parameter of RCPT passes
			}
			cases["RCPT TO:"+rest] = refusal{with(recipient, "!RCPT TO:"+rest+"\r\n"), reason}
		}
	}
	judge(t, cases)
}

func TestRecipientsAreBoundedAndCountedOnce(t *testing.T) {
	dialogue := slices.Clone(begun[:5])
	for i := range recipientsMax {
		dialogue = append(dialogue, "RCPT TO:<r"+strings.Repeat("x", i%60)+string(rune('a'+i/60))+"@x>\r\n", ok, "RCPT TO:<r"+strings.Repeat("x", i%60)+string(rune('a'+i/60))+"@X>\r\n", ok)
	}
	_, units, _ := talk(t, dialogue...)
	if last := units[len(units)-1]; len(last.To) != recipientsMax || !slices.IsSorted(last.To) || len(last.Text) > policy.MessageTextMax {
		t.Errorf("%d recipients, %q", len(last.To), last.Text)
	}
	judge(t, map[string]refusal{"one more": {with(dialogue, "!RCPT TO:<more@x>\r\n"), tooLarge}})
}

func TestTextIsLinesThatEndWithCRLF(t *testing.T) {
	line := strings.Repeat("x", textBytesMax-2)
	judge(t, map[string]refusal{
		"a bare LF":                      {with(texting, "!x\ny\r\n"), malformed},
		"a bare CR":                      {with(texting, "!x\ry\r\n"), malformed},
		"a bare LF alone":                {with(texting, "!\n"), malformed},
		"CR CR LF":                       {with(texting, "!x\r\r\n"), malformed},
		"an end with bare LF":            {with(texting, "!x\r\n.\n"), malformed},
		"an end with bare CR":            {with(texting, "!x\r\n.\r.\r\n"), malformed},
		"LF and an end":                  {with(texting, "!x\n.\r\n"), malformed},
		"a zero byte":                    {with(texting, "!x\x00\r\n"), malformed},
		"eight bits":                     {with(texting, "gr\xc3\xbc\xdfe\r\n.\r\n", ok, "NOOP\r\n"), ""},
		"a line of 1000 bytes":           {with(texting, line+"\r\n.\r\n"), ""},
		"a line of 1001 bytes":           {with(texting, "!x"+line+"\r\n"), tooLarge},
		"a line without an end":          {with(texting, "!"+line+"xx"), tooLarge},
		"an end at once":                 {with(texting, ".\r\n", ok, "QUIT\r\n"), ""},
		"lines that look like commands":  {with(texting, "MAIL FROM:<c@x>\r\nRCPT TO:<d@x>\r\nDATA\r\n.\r\n", ok, "NOOP\r\n"), ""},
		"a command behind the end":       {with(texting, "x\r\n.\r\nMAIL FROM:<c@x>\r\n"), ""},
		"a recipient behind the end":     {with(texting, "x\r\n.\r\n", "!RCPT TO:<c@x>\r\n"), malformed},
		"bytes behind the end":           {with(texting, "x\r\n.\r\n", "!x\r\n"), unsupported},
		"a dot that is doubled":          {with(texting, "..\r\n", "MAIL FROM:<c@x>\r\n", ".\r\n"), ""},
		"a dot with a space":             {with(texting, ". \r\n", "MAIL FROM:<c@x>\r\n", ".\r\n"), ""},
		"inside TLS, an end":             {with(inside, "DATA\r\nx\r\n.\r\nQUIT\r\n"), ""},
		"inside TLS, commands of upkeep": {with(inside, "DATA\r\n", "RSET\r\nQUIT\r\nDATA\r\nmailto:<a@x>\r\nMAIL\r\nmail is late\r\nRCPTS: <x>\r\nx MAIL FROM:<c@x>\r\n.MAIL FROM:<c@x>\r\n.\r\n"), ""},
		"inside TLS, MAIL":               {with(inside, "DATA\r\n", "!MAIL FROM:<c@x>\r\n"), unsupported},
		"inside TLS, Mail From:":         {with(inside, "DATA\r\nx\r\n", "!Mail From: the shop\r\n"), unsupported},
		"inside TLS, rcpt to:":           {with(inside, "DATA\r\nx\r\n", "!rcpt to:<c@x>\r\n"), unsupported},
		"inside TLS, a tab":              {with(inside, "DATA\r\n", "!MAIL\tFROM:<c@x>\r\n"), unsupported},
		"inside TLS, spaces before":      {with(inside, "DATA\r\n", "! \t\x0b RCPT   TO :<c@x>\r\n"), unsupported},
		"inside TLS, qmail's spelling":   {with(inside, "DATA\r\n", "!RCPT <c@x>\r\n"), unsupported},
	})
}

func TestChunks(t *testing.T) {
	without := []string{greeting, "EHLO f\r\n", "S:250-CHUNKING\r\n250 SIZE 1\r\n", "MAIL FROM:<a@x>\r\n", ok, "RCPT TO:<b@x>\r\n", ok}
	judge(t, map[string]refusal{
		"one":                           {with(begun, "BDAT 3 LAST\r\nx\r\n", ok, "MAIL FROM:<c@x>\r\n"), ""},
		"several, pipelined":            {with(begun, "BDAT 3\r\nx\r\nBDAT 2\r\nabBDAT 2 last\r\n\r\n", ok, ok, ok, "NOOP\r\n"), ""},
		"a line end cut in two":         {with(begun, "BDAT 2\r\nx\rBDAT 1 LAST\r\n\n"), ""},
		"nothing at the end":            {with(begun, "BDAT 3\r\nx\r\nBDAT 0 LAST\r\n", ok, ok, "MAIL FROM:<c@x>\r\n"), ""},
		"nothing in between":            {with(begun, "BDAT 0\r\nBDAT 3 LAST\r\nx\r\n"), ""},
		"nothing at all":                {with(begun, "BDAT 0 LAST\r\n", ok, "MAIL FROM:<c@x>\r\n"), ""},
		"a dot":                         {with(begun, "BDAT 9\r\nx\r\n.\r\ny\r\nBDAT 0 LAST\r\n"), ""},
		"RSET between":                  {with(begun, "BDAT 3\r\nx\r\nRSET\r\n", ok, ok, "MAIL FROM:<c@x>\r\n"), ""},
		"RCPT between":                  {with(begun, "BDAT 3\r\nx\r\n", "!RCPT TO:<c@x>\r\n"), malformed},
		"DATA between":                  {with(begun, "BDAT 3\r\nx\r\n", "!DATA\r\n"), malformed},
		"MAIL between":                  {with(begun, "BDAT 3\r\nx\r\n", "!MAIL FROM:<c@x>\r\n"), malformed},
		"a bare LF":                     {with(begun, "BDAT 3\r\n", "!x\ny"), malformed},
		"a bare CR":                     {with(begun, "BDAT 3\r\n", "!x\ry"), malformed},
		"a bare CR at the end":          {with(begun, "BDAT 2 LAST\r\n", "!x\r"), malformed},
		"a bare CR and nothing":         {with(begun, "BDAT 2\r\nx\r", "!BDAT 0 LAST\r\n"), malformed},
		"a zero byte":                   {with(begun, "BDAT 2\r\n", "!x\x00"), malformed},
		"a long line":                   {with(begun, "BDAT 5000\r\n", "!"+strings.Repeat("x", textBytesMax+1)), tooLarge},
		"a command in it":               {with(begun, "BDAT 20\r\n", "!x\r\nMAIL FROM:<c@x>\r\n"), unsupported},
		"a command at its beginning":    {with(begun, "BDAT 20\r\n", "!RCPT TO:<c@x>\r\n"), unsupported},
		"a command over two":            {with(begun, "BDAT 2\r\n", "!MA"), unsupported},
		"a verb at its end":             {with(begun, "BDAT 7\r\n", "!x\r\nRCPT"), unsupported},
		"a verb and a space":            {with(begun, "BDAT 8\r\n", "!x\r\nRCPT "), unsupported},
		"a size with a sign":            {with(begun, "!BDAT +3 LAST\r\n"), malformed},
		"a size below zero":             {with(begun, "!BDAT -3 LAST\r\n"), malformed},
		"a size in hexadecimal":         {with(begun, "!BDAT 0x3 LAST\r\n"), malformed},
		"a size of 11 digits":           {with(begun, "!BDAT 00000000003 LAST\r\n"), malformed},
		"no size":                       {with(begun, "!BDAT LAST\r\n"), malformed},
		"two spaces":                    {with(begun, "!BDAT  3 LAST\r\n"), malformed},
		"another word":                  {with(begun, "!BDAT 3 LATE\r\n"), malformed},
		"not announced":                 {with(without, "!BDAT 3 LAST\r\n"), unsupported},
		"announced to HELO only":        {[]string{greeting, "HELO f\r\n", "S:250-mail\r\n250 CHUNKING\r\n", "MAIL FROM:<a@x>\r\n", ok, "RCPT TO:<b@x>\r\n", ok, "!BDAT 3 LAST\r\n"}, unsupported},
		"before a reply":                {with(begun[:6], "!BDAT 3 LAST\r\n"), unsupported},
		"the sender was refused":        {with(begun[:3], "MAIL FROM:<a@x>\r\nRCPT TO:<b@x>\r\n", "S:503 nested\r\n", ok, "!BDAT 3 LAST\r\n"), malformed},
		"inside TLS":                    {with(inside, "BDAT 3 LAST\r\nx\r\n", "QUIT\r\n"), ""},
		"inside TLS, a command in it":   {with(inside, "BDAT 20 LAST\r\n", "!x\r\nMAIL FROM:<c@x>\r\n"), unsupported},
		"inside TLS, the end of a line": {with(inside, "BDAT 9\r\nx\r\nrcptsABDAT 2 LAST\r\n\r\n"), ""},
	})
}

func TestAnAuthenticationGoesOnAsTheServerSays(t *testing.T) {
	hello, tls := begun[:3], inside[:6]
	login := "dXNlcg==\r\n"
	judge(t, map[string]refusal{
		"LOGIN":                       {with(hello, "AUTH LOGIN\r\n", "S:334 VXNlcg==\r\n", login, "S:334 UGFzcw==\r\n", login, "S:235 ok\r\n", "NOOP\r\n"), ""},
		"PLAIN with nothing":          {with(hello, "AUTH PLAIN\r\n", "S:334 \r\n", login, "S:535 no\r\n", "AUTH PLAIN "+login), ""},
		"given up":                    {with(hello, "AUTH LOGIN\r\n", "S:334 VXNlcg==\r\n", "*\r\n", "S:501 no\r\n", "NOOP\r\n"), ""},
		"an empty line":               {with(hello, "AUTH LOGIN\r\n", "S:334 VXNlcg==\r\n", "\r\n", "S:501 no\r\n", "NOOP\r\n"), ""},
		"refused":                     {with(hello, "AUTH LOGIN\r\n", "S:504 no\r\n", "MAIL FROM:<a@x>\r\n"), ""},
		"refused, and a line comes":   {with(hello, "AUTH LOGIN\r\n", "S:504 no\r\n", "!"+login), unsupported},
		"a line before the reply":     {with(hello, "AUTH LOGIN\r\n", "!"+login), malformed},
		"a command before the reply":  {with(hello, "AUTH PLAIN "+login, "!NOOP\r\n"), malformed},
		"a command for a line":        {with(hello, "AUTH LOGIN\r\n", "S:334 VXNlcg==\r\n", "!MAIL FROM:<a@x>\r\n"), malformed},
		"five lines":                  {with(hello, "AUTH LOGIN\r\n", "S:334 x\r\n", login, "S:334 x\r\n", login, "S:334 x\r\n", login, "S:334 x\r\n", login, "S:334 x\r\n", "!"+login), malformed},
		"a long line":                 {with(hello, "AUTH PLAIN\r\n", "S:334 \r\n", "!"+strings.Repeat("a", textBytesMax)+"\r\n"), tooLarge},
		"inside TLS, LOGIN":           {with(tls, "AUTH LOGIN\r\n", login, login, "MAIL FROM:<a@x>\r\n"), ""},
		"inside TLS, refused":         {with(tls, "AUTH PLAIN "+login, "AUTH LOGIN\r\n", "QUIT\r\n"), ""},
		"inside TLS, five lines":      {with(tls, "AUTH LOGIN\r\n", login, login, login, login, "!"+login), malformed},
		"inside TLS, an unknown verb": {with(tls, "AUTH LOGIN\r\n", "!VRFY a\r\n"), unsupported},
		"inside TLS, inside a mail":   {with(inside, "!AUTH LOGIN\r\n"), unsupported},
		"inside TLS, behind a mail":   {with(inside, "DATA\r\nx\r\n.\r\n", "!AUTH LOGIN\r\n"), unsupported},
		"inside TLS, behind RSET":     {with(inside, "DATA\r\nx\r\n.\r\nRSET\r\nAUTH LOGIN\r\n"), ""},
	})
}

// A server that refused DATA holds the envelope, adds the next recipients to it, and keeps its sender.
func TestInsideTLSAFurtherMailMayBeOneToTheRecipientsBefore(t *testing.T) {
	sent := with(inside, "DATA\r\nx\r\n.\r\n")
	_, units, _ := talk(t, with(sent, "MAIL FROM:<a@x>\r\n", "RCPT TO:<c@x>\r\n", "DATA\r\ny\r\n.\r\n", "RSET\r\n", "MAIL FROM:<z@x>\r\n", "RCPT TO:<c@x>\r\n")...)

	var envelopes []string
	for _, u := range units {
		if u.Kind == Mail || u.Kind == Envelope {
			envelopes = append(envelopes, u.Text)
		}
	}
	want := []string{
		"smtp envelope from a@x", "smtp envelope from a@x to b@x", "smtp mail from a@x to b@x",
		"smtp envelope from a@x to b@x", "smtp envelope from a@x to b@x,c@x", "smtp mail from a@x to b@x,c@x",
		"smtp envelope from z@x", "smtp envelope from z@x to c@x",
	}
	if !slices.Equal(envelopes, want) {
		t.Errorf("got  %q\nwant %q", envelopes, want)
	}
	judge(t, map[string]refusal{
		"another sender":           {with(sent, "!MAIL FROM:<z@x>\r\n"), unsupported},
		"another sender, chunks":   {with(inside, "BDAT 3 LAST\r\nx\r\n", "!MAIL FROM:<z@x>\r\n"), unsupported},
		"a hello is no reset":      {with(sent, "EHLO f\r\n", "!MAIL FROM:<z@x>\r\n"), unsupported},
		"without a new recipient":  {with(sent, "MAIL FROM:<a@x>\r\n", "!DATA\r\n"), malformed},
		"a mail of before the TLS": {with(begun[:1], "MAIL FROM:<q@x>\r\n", ok, "RCPT TO:<b@x>\r\n", ok, "DATA\r\n", "S:354 go\r\n", "x\r\n.\r\n", ok, "STARTTLS\r\n", "S:220 go\r\n", "MAIL FROM:<z@x>\r\n"), ""},
	})
}

func TestTheServerIsNotHeardInsideTLS(t *testing.T) {
	c, _, _ := talk(t, with(inside[:6], "S:999 x\r\n", "S:nonsense\r\n", "MAIL FROM:<a@x>\r\n")...)

	if c.replies.lost {
		t.Error("it was")
	}
}

func TestBytesBehindTheReplyToSTARTTLSAreNotHeard(t *testing.T) {
	c, _, _ := talk(t, with(inside[:4], "S:220 go\r\n250-CHUNKING\r\n999")...)

	if !c.InTLS() || c.replies.lost {
		t.Errorf("inside TLS %v, lost %v", c.InTLS(), c.replies.lost)
	}
}
