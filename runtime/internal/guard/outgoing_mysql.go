package guard

import (
	"kalium.dev/kalium/runtime/internal/policy"
	"kalium.dev/kalium/runtime/internal/wire/mysql"
)

// mysqlSpeaker judges the packets of a MySQL client.
type mysqlSpeaker struct {
	o      *Outgoing
	client *mysql.Client
}

func newMySQLSpeaker(o *Outgoing) *mysqlSpeaker {
	// Peers at one address differ by schema, which the handshake names.
	var schemas []string
	for _, peer := range o.peers {
		schemas = append(schemas, peer.Schema)
	}
	return &mysqlSpeaker{o: o, client: mysql.NewClient(schemas...)}
}

// whole reads the length in a packet's header.
func (*mysqlSpeaker) whole(data []byte) int {
	if len(data) < 4 {
		return 0
	}
	return 4 + (int(data[0]) | int(data[1])<<8 | int(data[2])<<16)
}

func (*mysqlSpeaker) holdMax() int { return mysql.PacketBytesMax + holdBytesMax }

func (m *mysqlSpeaker) server(b []byte) { m.client.Server(b) }

func (m *mysqlSpeaker) unit(data []byte, _ *output) ruling {
	o := m.o
	n, unit, err := m.client.Next(data)
	if err != nil {
		return o.refuseFor(err, data)
	}
	if schema := m.client.Schema(); schema != "" && len(o.peers) > 1 {
		for i, peer := range o.peers {
			if peer.Schema == schema {
				o.peers = o.peers[i : i+1]
				break
			}
		}
	}
	switch unit.Kind {
	case mysql.Support:
		return ruling{n: n, outcome: o.support(policy.ProtocolMySQL, unit.Text)}
	case mysql.StartTLS:
		o.startTLS(func(*tlsSpeaker) speaker { return m })
		return ruling{n: n, outcome: o.support(policy.ProtocolMySQL, unit.Text)}
	case mysql.Message, mysql.Prepare:
	default:
		return ruling{outcome: o.refuse("a packet of unknown use", policy.ReasonUnsupported)}
	}
	message := &policy.Message{Kind: policy.KindMySQL, Peer: o.peer(), Verb: unit.Verb, Read: unit.Read, Write: unit.Write}
	if unit.Kind == mysql.Prepare {
		// It is judged when it is executed; a statement that the function never may execute could hold anything.
		if !o.g.knows(message) {
			return ruling{n: n, outcome: o.refuse(unit.Text, policy.ReasonNotInPolicy)}
		}
		return ruling{n: n, outcome: o.support(policy.ProtocolMySQL, unit.Text)}
	}
	outcome, _ := o.g.judge(o.t, message, policy.ProtocolMySQL)
	return ruling{n: n, outcome: outcome}
}
