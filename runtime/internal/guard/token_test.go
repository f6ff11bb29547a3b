package guard

import (
	"strings"
	"testing"

	"kalium.dev/kalium/runtime/internal/guard/guardtest"
	"kalium.dev/kalium/runtime/internal/wire/http1"
	"kalium.dev/kalium/runtime/internal/wire/http2"
)

// ends are both ends of an invoke: a guard whose function may invoke payer now, and payer's own guard. What is between
// them is played by gateway.
type ends struct {
	t              *testing.T
	tokens         *guardtest.Tokens
	caller, callee *Guard
	asked          *guardtest.Controller // by the callee's guard
}

func guardOf(t *testing.T, tokens *guardtest.Tokens, app, function string) (*Guard, *guardtest.Controller) {
	t.Helper()
	c := tokens.Controller(app, function)
	welcome := guardtest.WelcomeEdited(t, "enforce", `"app":"shop"`, `"app":"`+app+`"`)
	g, err := New(Identity{Container: "c", App: app, Function: function}, guardtest.PublicKey, welcome, c)
	if err != nil {
		t.Fatal(err)
	}
	return g, c
}

func bothEnds(t *testing.T) *ends {
	e := &ends{t: t, tokens: &guardtest.Tokens{}}
	e.caller, _ = guardOf(t, e.tokens, "shop", "buyer")
	request1(t, e.caller)
	e.caller.live.cursor = atState(e.caller, 2)
	e.callee, e.asked = guardOf(t, e.tokens, "shop", "payer")
	return e
}

// invoke has the caller's program write bytes in pieces, and returns those that leave.
func (e *ends) invoke(b string, size int) string {
	out := connect(e.t, e.caller, api)
	var sent strings.Builder
	for at := 0; at < len(b); at += size {
		left, outcome := out.Write([]byte(b[at:min(len(b), at+size)]))
		sent.Write(left)
		if outcome == Denied {
			break
		}
	}
	return sent.String()
}

// gateway passes a request on as ours does: fields that are between two hops go, and where it came from is added.
func (e *ends) gateway(sent string) string {
	e.t.Helper()
	head, n, err := http1.ParseIncoming([]byte(sent))
	if err != nil {
		e.t.Fatalf("the gateway got %q: %v", sent, err)
	}
	head.Target = "/"
	return string(head.Append(nil, nil, http1.Field{Name: "X-Forwarded-For", Value: "10.137.0.10"})) + sent[n:]
}

// arrive has a request come to the callee's guard in pieces.
func (e *ends) arrive(b string, size int) Admission {
	in := accept(e.t, e.callee)
	for at := size; ; at += size {
		a := in.Admit([]byte(b[:min(len(b), at)]), nil)
		if !a.Short || at >= len(b) {
			if a.Release != nil {
				respond(e.t, in)
			}
			return a
		}
	}
}

func (e *ends) hidden(a Admission) {
	e.t.Helper()
	if text := strings.ToLower(string(a.Release)); strings.Contains(text, "kalium") || strings.Contains(text, "feed0") {
		e.t.Errorf("the program sees %q", a.Release)
	}
}

const forged = "0123456789abcdef0123456789abcdef"

func TestATokenGoesFromGuardToGuardWhateverTheProgramWrites(t *testing.T) {
	for _, fields := range []string{
		"",
		"X-Kalium-Token: " + forged + "\r\n",
		"x-kalium-token: " + forged + "\r\n",
		"X-KALIUM-TOKEN: " + forged + "\r\n",
		"x-KaLiUm-tOkEn:" + forged + "\r\n",
		"X-Kalium-Token: " + forged + "\r\nX-Kalium-Token: " + forged + "\r\n",
		"X-Kalium-Token: " + forged + "\r\nx-kalium-token: \r\nX-KALIUM-TOKEN:\t" + forged + "\r\n",
		"X-Kalium-Token:\r\n",
		"X-Kalium-Callback-Token: " + forged + "\r\nX-Kalium-Anything: " + forged + "\r\n",
		"X-Forwarded-For: 10.137.0.1\r\nX-Forwarded-Kalium-Token: " + forged + "\r\n",
		"TE: trailers\r\nKeep-Alive: X-Kalium-Token\r\n",
	} {
		for _, size := range []int{1, 13, 1 << 16} {
			e := bothEnds(t)
			sent := e.invoke(request("POST /function/payer", "gateway:8080", fields, "Content-Length: 2\r\n")+"{}", size)
			if strings.Contains(sent, forged) || strings.Count(strings.ToLower(sent), "x-kalium-") != 1 {
				t.Errorf("%q: left as %q", fields, sent)
			}

			a := e.arrive(e.gateway(sent), size)

			released(t, a)
			e.hidden(a)
			if starts := e.asked.Started(); len(starts) != 1 || !strings.Contains(sent, starts[0].Token) || starts[0].Token == "" {
				t.Errorf("%q: asked %+v", fields, starts)
			}
		}
	}
}

func TestAProgramWritesATokenInNoOtherWay(t *testing.T) {
	line := "X-Kalium-Token: " + forged
	for name, try := range map[string]struct{ head, behind string }{
		"underscores":           {head: request("POST /function/payer", "gateway:8080", "X_Kalium_Token: "+forged+"\r\n")},
		"a mixture":             {head: request("POST /function/payer", "gateway:8080", "X-Kalium_Token: "+forged+"\r\n")},
		"a dot":                 {head: request("POST /function/payer", "gateway:8080", "X.Kalium.Token: "+forged+"\r\n")},
		"a folded line":         {head: request("POST /function/payer", "gateway:8080", "X-Any: thing\r\n "+line+"\r\n")},
		"a folded value":        {head: request("POST /function/payer", "gateway:8080", "X-Kalium-Token:\r\n "+forged+"\r\n")},
		"a tab in front":        {head: request("POST /function/payer", "gateway:8080", "\t"+line+"\r\n")},
		"space before colon":    {head: request("POST /function/payer", "gateway:8080", "X-Kalium-Token : "+forged+"\r\n")},
		"behind a line feed":    {head: request("POST /function/payer", "gateway:8080", "X-Any: thing\n"+line+"\r\n")},
		"behind a return":       {head: request("POST /function/payer", "gateway:8080", "X-Any: thing\r"+line+"\r\n")},
		"behind a zero":         {head: request("POST /function/payer", "gateway:8080", "X-Any: thing\x00"+line+"\r\n")},
		"a name that is quoted": {head: request("POST /function/payer", "gateway:8080", "\"X-Kalium-Token\": "+forged+"\r\n")},
		"beyond ASCII":          {head: request("POST /function/payer", "gateway:8080", "X-Kaliu\u1e3f-Token: "+forged+"\r\n")},
		"hop by hop":            {head: request("POST /function/payer", "gateway:8080", "Connection: close, X-Kalium-Token\r\n")},
		"hop by hop of a proxy": {head: request("POST /function/payer", "gateway:8080", "Proxy-Connection: x-kalium-token\r\n")},
		"announced trailer":     {head: request("POST /function/payer", "gateway:8080", "Transfer-Encoding: chunked\r\nTrailer: X-Kalium-Token\r\n")},
		"a query":               {head: request("POST /function/payer?X-Kalium-Token="+forged, "gateway:8080")},
		"a parameter":           {head: request("POST /function/payer;X-Kalium-Token="+forged, "gateway:8080")},
		"a path":                {head: request("POST /function/payer/"+forged, "gateway:8080")},
		"a fragment":            {head: request("POST /function/payer#"+forged, "gateway:8080")},
		"user information":      {head: request("POST /function/payer", forged+"@gateway:8080")},
		"HTTP/2":                {head: http2.Preface + "\x00\x00\x00\x04\x00\x00\x00\x00\x00"},
		"HTTP/1.0":              {head: strings.Replace(request("POST /function/payer", "gateway:8080", line+"\r\n"), "HTTP/1.1", "HTTP/1.0", 1)},
		"an upgrade to HTTP/2": {head: request("POST /function/payer", "gateway:8080",
			"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n")},
		"another method": {head: request("POST /function/payer", "gateway:8080", "X-HTTP-Method-Override: PUT\r\n")},
		"a trailer": {request("POST /function/payer", "gateway:8080", "Transfer-Encoding: chunked\r\n"),
			"2\r\n{}\r\n0\r\n" + line + "\r\n\r\n"},
		"a chunk extension": {request("POST /function/payer", "gateway:8080", "Transfer-Encoding: chunked\r\n"), "2;token=" + forged + "\r\n{}\r\n0\r\n\r\n"},
		"a request behind":  {request("POST /function/payer", "gateway:8080", "Content-Length: 0\r\n"), request("POST /function/payer", "gateway:8080", line+"\r\n")},
	} {
		for _, size := range []int{1, 13, 1 << 16} {
			e := bothEnds(t)

			sent := e.invoke(try.head+try.behind, size)

			if strings.Contains(sent, forged) || try.behind == "" && sent != "" {
				t.Errorf("%s in pieces of %d: left as %q", name, size, sent)
			}
		}
	}
}

func TestATokenStartsOneInvocationOfOneFunction(t *testing.T) {
	for name, try := range map[string]struct {
		spoil   func(e *ends, token string) (by *Guard, c *guardtest.Controller, said string)
		isAsked bool
		isSpent bool // the token itself
	}{
		"replayed": {func(e *ends, token string) (*Guard, *guardtest.Controller, string) {
			released(e.t, e.arrive(request("POST /", "f", "X-Kalium-Token: "+token+"\r\n"), 1<<16))
			return e.callee, e.asked, "X-Kalium-Token: " + token
		}, true, true},
		"stale": {func(e *ends, token string) (*Guard, *guardtest.Controller, string) {
			e.tokens.Expire()
			return e.callee, e.asked, "X-Kalium-Token: " + token
		}, true, true},
		"altered": {func(e *ends, token string) (*Guard, *guardtest.Controller, string) {
			return e.callee, e.asked, "X-Kalium-Token: 1" + token[1:]
		}, true, false},
		"for another function": {func(e *ends, token string) (*Guard, *guardtest.Controller, string) {
			g, c := guardOf(e.t, e.tokens, "shop", "buyer") // an entry
			return g, c, "X-Kalium-Token: " + token
		}, true, false},
		"for another app": {func(e *ends, token string) (*Guard, *guardtest.Controller, string) {
			g, c := guardOf(e.t, e.tokens, "bank", "payer")
			return g, c, "X-Kalium-Token: " + token
		}, true, false},
		"in capitals":   {spoilt(strings.ToUpper), false, false},
		"cut":           {spoilt(func(token string) string { return token[1:] }), false, false},
		"longer":        {spoilt(func(token string) string { return token + "0" }), false, false},
		"empty":         {spoilt(func(string) string { return "" }), false, false},
		"quoted":        {spoilt(func(token string) string { return `"` + token + `"` }), false, false},
		"a list":        {spoilt(func(token string) string { return token + ", " + token }), false, false},
		"with a space":  {spoilt(func(token string) string { return token[:16] + " " + token[16:] }), false, false},
		"twice":         {spoilt(func(token string) string { return token + "\r\nX-Kalium-Token: " + token }), false, false},
		"twice by case": {spoilt(func(token string) string { return token + "\r\nx-KALIUM-token: " + forged }), false, false},
		"and an empty":  {spoilt(func(token string) string { return token + "\r\nx-kalium-token:" }), false, false},
	} {
		for _, size := range []int{1, 13, 1 << 16} {
			e := bothEnds(t)
			token := e.tokens.Issue("shop", "payer")
			g, c, said := try.spoil(e, token)
			before := len(c.Started())
			own := e.callee

			e.callee = g
			a := e.arrive(request("POST /", "f", said+"\r\n"), size)

			refusedWith(t, a, "403", "bad_token")
			if r := c.Last(t); r.Allowed || r.Reason != "bad_token" || r.Kind != "start" {
				t.Errorf("%s: verdict %+v", name, r)
			}
			if isAsked := len(c.Started()) > before; isAsked != try.isAsked {
				t.Errorf("%s: the controller was asked: %t", name, isAsked)
			}
			e.callee = own
			again := e.arrive(request("POST /", "f", "x-kalium-token: "+token+"\r\n"), size)
			if (again.Release == nil) != try.isSpent {
				t.Errorf("%s: the token itself: %q %q", name, again.Release, again.Refusal)
			}
			e.hidden(again)
		}
	}
}

// spoilt says another token than the one that was issued.
func spoilt(change func(token string) string) func(*ends, string) (*Guard, *guardtest.Controller, string) {
	return func(e *ends, token string) (*Guard, *guardtest.Controller, string) {
		return e.callee, e.asked, "X-Kalium-Token: " + change(token)
	}
}

func TestATokenComesInNoOtherWay(t *testing.T) {
	for name, try := range map[string]struct {
		request func(token string) string
		reason  string
	}{
		"a query":            {func(token string) string { return request("POST /?X-Kalium-Token="+token, "f") }, "not_an_entry"},
		"a callback's field": {func(token string) string { return request("POST /", "f", "X-Kalium-Callback-Token: "+token+"\r\n") }, "not_an_entry"},
		"another name":       {func(token string) string { return request("POST /", "f", "Kalium-Token: "+token+"\r\n") }, "not_an_entry"},
		"a folded line":      {func(token string) string { return request("POST /", "f", "X-Any: a\r\n X-Kalium-Token: "+token+"\r\n") }, "malformed"},
		"a folded value":     {func(token string) string { return request("POST /", "f", "X-Kalium-Token:\r\n "+token+"\r\n") }, "malformed"},
		"space before colon": {func(token string) string { return request("POST /", "f", "X-Kalium-Token : "+token+"\r\n") }, "malformed"},
		"underscores":        {func(token string) string { return request("POST /", "f", "X_Kalium_Token: "+token+"\r\n") }, "malformed"},
		"a line feed":        {func(token string) string { return request("POST /", "f", "X-Any: a\nX-Kalium-Token: "+token+"\r\n") }, "malformed"},
		"hop by hop": {func(token string) string {
			return request("POST /", "f", "X-Kalium-Token: "+token+"\r\nConnection: X-Kalium-Token\r\n")
		}, "unsupported"},
		"an announced trailer": {func(string) string {
			return request("POST /", "f", "Transfer-Encoding: chunked\r\nTrailer: X-Kalium-Token\r\n")
		}, "unsupported"},
		"HTTP/2": {func(string) string { return http2.Preface }, "unsupported"},
	} {
		for _, size := range []int{1, 13, 1 << 16} {
			e := bothEnds(t)
			token := e.tokens.Issue("shop", "payer")

			refusedWith(t, e.arrive(try.request(token), size), "403", try.reason)

			for _, start := range e.asked.Started() {
				if start.Token != "" {
					t.Errorf("%s: asked %+v", name, start)
				}
			}
		}
	}
}

// A trailer behind a released body belongs to nobody.
func TestATrailerWithATokenDoesNotReachTheProgram(t *testing.T) {
	e := bothEnds(t)
	token := e.tokens.Issue("shop", "payer")
	a := e.arrive(request("POST /", "f", "Transfer-Encoding: chunked\r\nX-Kalium-Token: "+token+"\r\n"), 1<<16)
	released(t, a)

	n, done, err := a.Body.Feed([]byte("2\r\n{}\r\n0\r\nX-Kalium-Token: " + token + "\r\n\r\n"))

	if err == nil || done || n > len("2\r\n{}\r\n0\r\n") {
		t.Errorf("%d bytes, done %t, %v", n, done, err)
	}
}

// One token an invoke, whatever order the requests of a connection come in.
func TestEachInvokeHasATokenOfItsOwn(t *testing.T) {
	e := bothEnds(t)
	e.caller.live.cursor = atState(e.caller, 2)
	out := connect(t, e.caller, api)
	seen := map[string]bool{}
	for range 3 {
		e.caller.live.cursor = atState(e.caller, 2)
		sent, _ := out.Write([]byte(request("POST /function/payer", "gateway:8080")))
		_, token, _ := strings.Cut(string(sent), "X-Kalium-Token: ")
		seen[token] = true
	}
	if len(seen) != 3 || seen[""] {
		t.Errorf("tokens %v", seen)
	}
}

func TestNoOtherPeerThanTheGatewayGetsAToken(t *testing.T) {
	e := bothEnds(t)
	e.caller.live.cursor = atState(e.caller, 0)

	sent, outcome := connect(t, e.caller, api).Write([]byte(request("GET /a", "api.test:8080")))

	if outcome != Allowed || strings.Contains(strings.ToLower(string(sent)), "kalium") {
		t.Errorf("sent %q", sent)
	}
}
