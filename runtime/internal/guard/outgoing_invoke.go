package guard

import (
	"fmt"
	"strings"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/policy"
	"kalium.dev/kalium/runtime/internal/wire/http1"
)

// The fields by which guards and the gateway hand on what the controller has issued. No program reads or writes them.
const (
	tokenField         = "X-Kalium-Token"
	callbackTokenField = "X-Kalium-Callback-Token"
	// callbackField says where the gateway posts the result of an asynchronous invocation. The guard alone writes it.
	callbackField = "X-Callback-Url"
)

const functionNameMax = 63 // a label of DNS, as the gateway has it

// invoke judges a request to the gateway. It has one spelling; everything else at the gateway, its administration above
// all, is reached by nobody. The head is written anew, in audit too: a token comes from the controller or not at all.
func (o *Outgoing) invoke(peer policy.Peer, head *http1.RequestHead, message *policy.Message, w *output) (Outcome, *invocation) {
	callee, asynchronous, spelled := calleeOf(head)
	var outcome Outcome
	var inv *invocation
	var fields []http1.Field // of the guard's
	s := o.g.stand()
	several := s.maxInflight() > 1
	if spelled {
		outcome, inv, fields = o.edge(peer, head, &policy.Message{Kind: policy.KindInvoke, Peer: peer.Name, Callee: callee, Asynchronous: asynchronous})
		if several && outcome == Allowed && inv.label != "" {
			fields = append(fields, http1.Field{Name: callField, Value: inv.label})
		}
	} else {
		reason := policy.ReasonGatewayRule
		if s.refusal != "" {
			reason = s.refusal
		}
		outcome = o.g.refuse(s, subject{kind: "invoke", text: "invoke by " + message.Text(), peer: peer.Name}, reason, o.g.now())
	}
	if outcome == Denied {
		return Denied, nil
	}
	w.instead()
	w.b = head.Append(w.b, func(name string) bool {
		return strings.HasPrefix(name, "x-forwarded-") || strings.HasPrefix(name, "x-kalium-") || several && name == callFieldLower
	}, fields...)
	return outcome, inv
}

// calleeOf reads the one spelling of an invoke: POST to /function/NAME, or to /async-function/NAME, and nothing behind it.
// Where an asynchronous result goes to is not the program's to say.
func calleeOf(head *http1.RequestHead) (callee string, asynchronous, spelled bool) {
	callee, spelled = strings.CutPrefix(head.Target, "/function/")
	if !spelled {
		callee, asynchronous = strings.CutPrefix(head.Target, "/async-function/")
		spelled = asynchronous
	}
	spelled = spelled && head.Method == "POST" && isFunctionName(callee)
	for i := range head.Fields {
		spelled = spelled && !strings.EqualFold(head.Fields[i].Name, callbackField)
	}
	return callee, asynchronous, spelled
}

// isFunctionName tells names in the gateway's own namespace: NAME.NAMESPACE is another one's.
func isFunctionName(name string) bool {
	if name == "" || len(name) > functionNameMax || name[0] == '-' || name[len(name)-1] == '-' {
		return false
	}
	for i := range len(name) {
		if c := name[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}

// callOf is the call that the program copied from its request. A function that works on several at a time finds it in
// the place of the client's label, which the guard puts back on the way out. Two of them are none.
func callOf(head *http1.RequestHead) (call string) {
	found := 0
	for i := range head.Fields {
		if strings.EqualFold(head.Fields[i].Name, callField) {
			call = head.Fields[i].Value
			found++
		}
	}
	if found != 1 {
		return ""
	}
	return call
}

// edge judges an app edge: the function CFG first, which costs nothing, and then the controller. It returns the fields that
// go with the request.
func (o *Outgoing) edge(peer policy.Peer, head *http1.RequestHead, m *policy.Message) (Outcome, *invocation, []http1.Field) {
	e := &edge{call: callOf(head), ask: func(inv *invocation, again bool) (*frame.Answer, error) {
		return o.g.controller.Invoke(o.g.now().Add(time.Duration(inv.policy.DeadlineMS)*time.Millisecond), &frame.Invoke{
			Step: newStep(), Call: inv.call, Invocation: inv.id, Callee: m.Callee, Version: inv.policy.Version,
			Asynchronous: m.Asynchronous, Callback: m.Callback, Retry: again,
		})
	}}
	outcome, inv := o.g.judgeEdge(o.t, m, "invoke", e)
	if outcome == Allowed {
		o.asked(inv, cloned(m), e.number)
	}
	var fields []http1.Field
	if m.Callback != "" {
		fields = append(fields, http1.Field{Name: callbackField, Value: fmt.Sprintf("http://%s:%d/function/%s", peer.Host, peer.Port, m.Callback)})
	}
	if e.token != "" {
		fields = append(fields, http1.Field{Name: tokenField, Value: e.token})
	}
	if e.callback != "" {
		fields = append(fields, http1.Field{Name: callbackTokenField, Value: e.callback})
	}
	return outcome, inv, fields
}
