package guard

import (
	"kalium.dev/kalium/runtime/internal/policy"
	"kalium.dev/kalium/runtime/internal/wire"
	"kalium.dev/kalium/runtime/internal/wire/mysql"
)

// mysqlSpeaker judges the packets of a MySQL client.
type mysqlSpeaker struct {
	o       *Outgoing
	clients []*mysql.Client // one for each of the connection's peers
}

func newMySQLSpeaker(o *Outgoing) *mysqlSpeaker {
	m := &mysqlSpeaker{o: o}
	for _, peer := range o.peers {
		m.clients = append(m.clients, mysql.NewClient(peer.Schema))
	}
	return m
}

// whole reads the length in a packet's header.
func (*mysqlSpeaker) whole(data []byte) int {
	if len(data) < 4 {
		return 0
	}
	return 4 + (int(data[0]) | int(data[1])<<8 | int(data[2])<<16)
}

func (*mysqlSpeaker) holdMax() int { return mysql.PacketBytesMax + holdBytesMax }

func (m *mysqlSpeaker) unit(data []byte, _ *output) ruling {
	o := m.o
	var n int
	var unit mysql.Unit
	var err error
	// Peers at one address differ by schema. The handshake names it, so only one client gets past it.
	for i, client := range m.clients {
		n, unit, err = client.Next(data)
		if err == wire.ErrShort {
			return short
		}
		if err == nil {
			m.clients, o.peers = m.clients[i:i+1], o.peers[i:i+1]
			break
		}
	}
	if err != nil {
		return o.refuseFor(err, "")
	}
	if unit.Support {
		return ruling{n: n, outcome: o.support("mysql", unit.Text)}
	}
	message := &policy.Message{Kind: policy.KindMySQL, Peer: o.peer(), Verb: unit.Verb, Read: unit.Read, Write: unit.Write}
	outcome, _ := o.g.judge(o.t, message, "mysql", nil)
	return ruling{n: n, outcome: outcome}
}
