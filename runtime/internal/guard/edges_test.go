package guard

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/guard/guardtest"
	"kalium.dev/kalium/runtime/internal/policy"
)

const (
	payerText     = `{"asynchronous":false,"callback":"","callee":"payer","kind":"invoke","line":3,"retries":0,"peer":"gateway","tail":false,"text":"invoke payer"}`
	callbackToken = "ffeeddccbbaa99887766554433221100"
	asyncOfPayer  = "POST /async-function/payer"
)

// payerLine is the policy's line of an invoke of payer.
func payerLine(line int, asynchronous bool, callback string, retries int) string {
	text := "invoke payer"
	if asynchronous {
		text += " async"
	}
	if callback != "" {
		text += " callback " + callback
	}
	return fmt.Sprintf(`{"asynchronous":%t,"callback":%q,"callee":"payer","kind":"invoke","line":%d,"retries":%d,"peer":"gateway","tail":false,"text":%q}`,
		asynchronous, callback, line, retries, text)
}

// secondLine adds a symbol behind the others; symbol 8.
func secondLine(line string) []string {
	return []string{`"text":"https POST images /g grpc","upgrade":false}]`, `"text":"https POST images /g grpc","upgrade":false},` + line + `]`}
}

// ready is a guard with a request, whose function may invoke payer now.
func ready(t *testing.T, mode string, pairs ...string) (*Guard, *guardtest.Controller) {
	t.Helper()
	g, c := edited(t, mode, pairs...)
	request1(t, g)
	g.live.cursor = atState(g, 2)
	return g, c
}

// grantBoth grants an edge and, where there is one, its callback, and notes what was asked.
func grantBoth(c *guardtest.Controller) *[]frame.Invoke {
	asked := &[]frame.Invoke{}
	c.OnInvoke = func(m *frame.Invoke) (*frame.Answer, error) {
		*asked = append(*asked, *m)
		answer, _ := guardtest.GrantInvoke(m)
		if m.Callback != "" {
			answer.Callback = callbackToken
		}
		return answer, nil
	}
	return asked
}

func TestAnAsynchronousInvokeIsAnEdgeOfItsOwn(t *testing.T) {
	for _, mode := range []string{"enforce", "audit"} {
		g, c := ready(t, mode, payerText, payerLine(3, true, "", 0))
		asked := grantBoth(c)
		out := connect(t, g, api)

		expect(t, out, request(asyncOfPayer, "gateway:8080", "Content-Length: 2\r\n")+"{}",
			request(asyncOfPayer, "gateway:8080", "Content-Length: 2\r\n", "X-Kalium-Token: "+guardtest.Token+"\r\n")+"{}", Allowed)

		if m := (*asked)[0]; !m.Asynchronous || m.Callback != "" || m.Retry || m.Callee != "payer" {
			t.Errorf("asked %+v", m)
		}
		if r := c.Last(t); r.Message != "invoke payer async" || r.Reason != "allowed" {
			t.Errorf("verdict %+v", r)
		}
	}
}

func TestOneSpellingOfAnEdgeIsNotTheOther(t *testing.T) {
	for _, try := range []struct {
		line, invoke string
		message      string
	}{
		{payerLine(3, true, "", 0), invokeOfPayer, "invoke payer"},
		{payerLine(3, false, "", 0), asyncOfPayer, "invoke payer async"},
	} {
		g, c := ready(t, "enforce", payerText, try.line)

		expect(t, connect(t, g, api), request(try.invoke, "gateway:8080"), "", Denied)

		if r := c.Last(t); r.Reason != "not_in_policy" || r.Message != try.message {
			t.Errorf("verdict %+v", r)
		}
	}
}

func TestTheGuardWritesTheCallbackThatThePolicyNames(t *testing.T) {
	for _, mode := range []string{"enforce", "audit"} {
		g, c := ready(t, mode, payerText, payerLine(3, true, "buyer", 0))
		asked := grantBoth(c)

		expect(t, connect(t, g, api), request(asyncOfPayer, "gateway:8080", "x-kalium-callback-token: forged\r\n"), request(asyncOfPayer, "gateway:8080",
			"X-Callback-Url: http://gateway:8080/function/buyer\r\n", "X-Kalium-Token: "+guardtest.Token+"\r\n",
			"X-Kalium-Callback-Token: "+callbackToken+"\r\n"), Allowed)

		if m := (*asked)[0]; !m.Asynchronous || m.Callback != "buyer" {
			t.Errorf("asked %+v", m)
		}
		if r := c.Last(t); r.Message != "invoke payer async callback buyer" || r.Line != 3 {
			t.Errorf("verdict %+v", r)
		}
	}
}

func TestAGrantOfACallbackCarriesItsToken(t *testing.T) {
	g, c := ready(t, "enforce", payerText, payerLine(3, true, "buyer", 0))
	c.OnInvoke = guardtest.GrantInvoke // without one

	expect(t, connect(t, g, api), request(asyncOfPayer, "gateway:8080"), "", Denied)

	lastReason(t, c, policy.ReasonMalformed)
}

func TestWithoutTheControllerACallbackGoesWithoutTokens(t *testing.T) {
	g, c := ready(t, "enforce", failDeny, failing("allow"), payerText, payerLine(3, true, "buyer", 0))
	c.OnInvoke = func(*frame.Invoke) (*frame.Answer, error) { return nil, errNoAnswer }

	expect(t, connect(t, g, api), request(asyncOfPayer, "gateway:8080"),
		request(asyncOfPayer, "gateway:8080", "X-Callback-Url: http://gateway:8080/function/buyer\r\n"), Allowed)
}

func TestACallbackThatIsNotCertainIsDenied(t *testing.T) {
	withCallback, without, other := payerLine(3, true, "buyer", 0), payerLine(9, true, "", 0), payerLine(9, true, "payer", 0)
	const edges, also, later = `[2,2,3],[3,4,4],[3,5,3],[3,6,3],[3,7,3]`, `[2,2,3],[2,8,4],[3,4,4],[3,5,3],[3,6,3],[3,7,3]`,
		`[2,2,3],[3,4,4],[3,5,3],[3,6,3],[3,7,3],[3,8,4]`
	for name, try := range map[string]struct {
		second, edges string
		at            int
		callback      string // "-": refused
	}{
		"two callbacks":           {other, also, 2, "-"},
		"one callback and none":   {without, also, 2, "-"},
		"the same one twice":      {payerLine(9, true, "buyer", 0), also, 2, "buyer"},
		"one now and one later":   {other, later, 2, "buyer"},
		"later it is the other":   {other, later, 3, "payer"},
		"a synchronous one, too":  {payerLine(9, false, "", 0), also, 2, "buyer"},
		"nowhere near":            {other, later, 0, "out of order"},
		"none where others would": {without, later, 3, ""},
	} {
		for _, mode := range []string{"enforce", "audit"} {
			pairs := append([]string{payerText, withCallback, edges, try.edges}, secondLine(try.second)...)
			g, c := ready(t, mode, pairs...)
			g.live.cursor = atState(g, try.at)
			asked := grantBoth(c)

			_, outcome := connect(t, g, api).Write([]byte(request(asyncOfPayer, "gateway:8080")))

			r := c.Last(t)
			switch try.callback {
			case "-":
				if r.Reason != "gateway_rule" || r.Message != "invoke payer async" || len(*asked) != 0 || (outcome == Denied) != (mode == "enforce") {
					t.Errorf("%s: outcome %d, verdict %+v", name, outcome, r)
				}
			case "out of order":
				if r.Reason != "out_of_order" || r.Message != "invoke payer async callback buyer" || r.Line != 3 {
					t.Errorf("%s: verdict %+v", name, r)
				}
			default:
				if r.Reason != "allowed" || len(*asked) != 1 || (*asked)[0].Callback != try.callback {
					t.Errorf("%s: verdict %+v, asked %+v", name, r, *asked)
				}
			}
		}
	}
}

// endsUnanswered is the end of a connection on which nothing came.
func endsUnanswered(out *Outgoing) { out.Ended() }

func TestAnInvokeWithoutAnAnswerIsAskedForAgainAndMovesNothing(t *testing.T) {
	for _, try := range []struct{ line, invoke string }{
		{payerLine(3, false, "", 1), invokeOfPayer},
		{payerLine(3, true, "", 1), asyncOfPayer},
		{payerLine(3, true, "buyer", 1), asyncOfPayer},
	} {
		for _, mode := range []string{"enforce", "audit"} {
			g, c := ready(t, mode, payerText, try.line)
			asked := grantBoth(c)
			out := connect(t, g, api)
			first, _ := out.Write([]byte(request(try.invoke, "gateway:8080")))
			sent := string(first)
			endsUnanswered(out)

			again, outcome := connect(t, g, api).Write([]byte(request(try.invoke, "gateway:8080")))

			if string(again) != sent || outcome != Allowed {
				t.Errorf("sent %q and %q", sent, again)
			}
			if r := c.Last(t); r.Judging != "retry" || !slices.Equal(r.States, []int{3}) || r.Reason != "allowed" {
				t.Errorf("verdict %+v", r)
			}
			if len(*asked) != 2 || (*asked)[0].Retry || !(*asked)[1].Retry || (*asked)[0].Step == (*asked)[1].Step ||
				(*asked)[0].Callback != (*asked)[1].Callback {
				t.Errorf("asked %+v", *asked)
			}
			if states := g.live.cursor.States(); !slices.Equal(states, []int{3}) {
				t.Errorf("the cursor is at %v", states)
			}
		}
	}
}

// The lost edge is repeated with its own callback, although the line that could be next has another one.
func TestARetryKeepsItsCallback(t *testing.T) {
	pairs := append([]string{payerText, payerLine(3, true, "buyer", 1), `[3,7,3]`, `[3,7,3],[3,8,4]`}, secondLine(payerLine(9, true, "payer", 0))...)
	g, c := ready(t, "enforce", pairs...)
	asked := grantBoth(c)
	out := connect(t, g, api)
	out.Write([]byte(request(asyncOfPayer, "gateway:8080")))
	endsUnanswered(out)

	for range 2 {
		connect(t, g, api).Write([]byte(request(asyncOfPayer, "gateway:8080")))
	}

	if len(*asked) != 3 || (*asked)[1].Callback != "buyer" || !(*asked)[1].Retry || (*asked)[2].Callback != "payer" || (*asked)[2].Retry {
		t.Errorf("asked %+v", *asked)
	}
}

func TestAnInvokeIsNotRepeatedBeyondWhatThePolicySays(t *testing.T) {
	once := payerLine(3, false, "", 1)
	twoInvokes := []string{payerText, once, `[3,7,3]`, `[3,7,3],[3,8,4]`}
	twoInvokes = append(twoInvokes, secondLine(strings.ReplaceAll(payerLine(9, false, "", 1), "payer", "buyer"))...)
	lost := func(t *testing.T, g *Guard, line string) {
		out := connect(t, g, api)
		out.Write([]byte(request(line, "gateway:8080")))
		endsUnanswered(out)
	}
	for name, try := range map[string]struct {
		pairs []string
		then  func(t *testing.T, g *Guard)
	}{
		"no retries": {nil, func(t *testing.T, g *Guard) { lost(t, g, invokeOfPayer) }},
		"answered": {[]string{payerText, once}, func(t *testing.T, g *Guard) {
			out := connect(t, g, api)
			out.Write([]byte(request(invokeOfPayer, "gateway:8080")))
			out.Answered(1)
			out.Ended()
		}},
		"still open": {[]string{payerText, once}, func(t *testing.T, g *Guard) {
			connect(t, g, api).Write([]byte(request(invokeOfPayer, "gateway:8080")))
		}},
		"twice": {[]string{payerText, once}, func(t *testing.T, g *Guard) { lost(t, g, invokeOfPayer); lost(t, g, invokeOfPayer) }},
		"another edge since": {twoInvokes, func(t *testing.T, g *Guard) {
			lost(t, g, invokeOfPayer)
			lost(t, g, "POST /function/buyer")
		}},
		"another edge before its end": {twoInvokes, func(t *testing.T, g *Guard) {
			out := connect(t, g, api)
			out.Write([]byte(request(invokeOfPayer, "gateway:8080")))
			connect(t, g, api).Write([]byte(request("POST /function/buyer", "gateway:8080")))
			endsUnanswered(out)
		}},
	} {
		g, c := ready(t, "enforce", try.pairs...)
		grantBoth(c)
		try.then(t, g)

		expect(t, connect(t, g, api), request(invokeOfPayer, "gateway:8080"), "", Denied)

		if r := c.Last(t); r.Reason != "out_of_order" {
			t.Errorf("%s: verdict %+v", name, r)
		}
	}
}

func TestARetryThatTheControllerRefusesIsDenied(t *testing.T) {
	g, c := ready(t, "enforce", payerText, payerLine(3, false, "", 3))
	out := connect(t, g, api)
	out.Write([]byte(request(invokeOfPayer, "gateway:8080")))
	endsUnanswered(out)
	c.OnInvoke = func(*frame.Invoke) (*frame.Answer, error) { return &frame.Answer{Reason: "edge_not_allowed"}, nil }

	expect(t, connect(t, g, api), request(invokeOfPayer, "gateway:8080"), "", Denied)

	lastReason(t, c, policy.ReasonEdgeNotAllowed)
	// It was not sent, so it may be tried again.
	grantBoth(c)
	if _, outcome := connect(t, g, api).Write([]byte(request(invokeOfPayer, "gateway:8080"))); outcome != Allowed {
		t.Errorf("outcome %d", outcome)
	}
}
