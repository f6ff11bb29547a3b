package guard

import (
	"kalium.dev/kalium/runtime/internal/policy"
	"kalium.dev/kalium/runtime/internal/wire/smtp"
)

// smtpSpeaker judges mails by their envelopes.
type smtpSpeaker struct {
	o      *Outgoing
	client *smtp.Client
	inv    *invocation // that the text of a mail belongs to
	left   int64       // how much text may still come
}

func newSMTPSpeaker(o *Outgoing) *smtpSpeaker { return &smtpSpeaker{o: o, client: smtp.NewClient()} }

func (*smtpSpeaker) whole([]byte) int  { return 0 }
func (*smtpSpeaker) holdMax() int      { return holdBytesMax }
func (s *smtpSpeaker) server(b []byte) { s.client.Server(b) }

func (s *smtpSpeaker) unit(data []byte, _ *output) ruling {
	o := s.o
	if o.tls == nil && s.client.InTLS() {
		o.startTLS(func(*tlsSpeaker) speaker { return s })
		return ruling{outcome: Allowed}
	}
	n, unit, err := s.client.Next(data)
	if err != nil {
		return o.refuseFor(err, data)
	}
	switch unit.Kind {
	case smtp.Support, smtp.StartTLS:
		return ruling{n: n, outcome: o.support(policy.ProtocolSMTP, unit.Text)}
	case smtp.Body:
		return ruling{n: n, outcome: s.text(&unit)}
	case smtp.Envelope, smtp.Mail:
	default:
		return ruling{outcome: o.refuse("a command of unknown use", policy.ReasonUnsupported)}
	}
	message := &policy.Message{Kind: policy.KindSMTP, Peer: o.peer(), From: unit.From, To: unit.To}
	if unit.Kind == smtp.Envelope {
		// A denial of the mail would come too late for its addresses. What allows them moves nothing, so their number has the
		// bound of support traffic.
		outcome := o.g.could(message, policy.ProtocolSMTP)
		if outcome == Allowed {
			outcome = o.support(policy.ProtocolSMTP, unit.Text)
		}
		return ruling{n: n, outcome: outcome}
	}
	var outcome Outcome
	outcome, s.inv = o.g.judge(o.t, message, policy.ProtocolSMTP)
	s.left = o.bodyMax()
	return ruling{n: n, outcome: outcome}
}

// text passes the text of a mail, as long as its invocation lasts.
func (s *smtpSpeaker) text(unit *smtp.Unit) Outcome {
	switch {
	case s.inv.over():
		return s.o.refuse("a mail beyond its invocation", policy.ReasonNoInvocation)
	case int64(unit.Bytes) > s.left:
		return s.o.refuse("a mail beyond its bound", policy.ReasonTooLarge)
	}
	s.left -= int64(unit.Bytes)
	return s.o.flow(policy.ProtocolSMTP, "smtp text")
}
