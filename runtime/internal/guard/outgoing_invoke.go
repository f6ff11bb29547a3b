package guard

import (
	"strings"
	"time"

	"kalium.dev/kalium/runtime/internal/frame"
	"kalium.dev/kalium/runtime/internal/policy"
	"kalium.dev/kalium/runtime/internal/wire/http1"
)

// invoke judges a request to the gateway. It has one spelling; everything else at the gateway, its administration above
// all, is reached by nobody. The head is written anew, in audit too: a token comes from the controller or not at all.
func (o *Outgoing) invoke(peer policy.Peer, head *http1.RequestHead, message *policy.Message, w *output) (Outcome, *invocation) {
	callee, spelled := strings.CutPrefix(head.Path, "/function/")
	spelled = spelled && callee != "" && !strings.Contains(callee, "/") && head.Method == "POST" && !strings.Contains(head.Target, "?")
	for i := range head.Fields {
		spelled = spelled && !strings.EqualFold(head.Fields[i].Name, "X-Callback-Url")
	}
	var outcome Outcome
	var inv *invocation
	var fields []http1.Field // of the guard's
	s := o.g.stand()
	several := s.maxInflight() > 1
	if spelled {
		outcome, inv, fields = o.edge(callOf(head), &policy.Message{Kind: policy.KindInvoke, Peer: peer.Name, Callee: callee})
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

// edge judges an app edge: the function CFG first, which costs nothing, and then the controller.
func (o *Outgoing) edge(call string, m *policy.Message) (Outcome, *invocation, []http1.Field) {
	var token []http1.Field
	outcome, inv := o.g.judgeOf(o.t, call, m, "invoke", func(inv *invocation) (policy.Verdict, error) {
		answer, err := o.g.controller.Invoke(o.g.now().Add(time.Duration(inv.policy.DeadlineMS)*time.Millisecond), &frame.Invoke{
			Step: newStep(), Call: inv.call, Invocation: inv.id, Callee: m.Callee, Version: inv.policy.Version,
		})
		if err != nil {
			return policy.Verdict{}, err
		}
		verdict := verdictOf(answer, answer.Token != "")
		if verdict.Allowed {
			token = []http1.Field{{Name: tokenField, Value: answer.Token}}
		}
		return verdict, nil
	})
	return outcome, inv, token
}

// tokenField carries the workflow token between guards. No program reads or writes it.
const tokenField = "X-Kalium-Token"

// verdictOf reads the controller's answer. complete says that it carries what a grant has to carry.
func verdictOf(answer *frame.Answer, complete bool) policy.Verdict {
	reason := policy.Reason(answer.Reason)
	if answer.Allowed && complete && reason == policy.ReasonAllowed {
		return policy.Verdict{Allowed: true, Reason: policy.ReasonAllowed}
	}
	if reason == policy.ReasonAllowed || !reason.Known() {
		reason = policy.ReasonControllerUnavailable // an answer that contradicts itself is none
	}
	expected := answer.Expected
	if len(expected) > policy.ExpectedMax {
		expected = expected[:policy.ExpectedMax]
	}
	return policy.Verdict{Reason: reason, Expected: expected}
}
