package mysql

// Capability flags (page "Capabilities Flags").
const (
	clientLongPassword    = 1 << 0 // MariaDB calls it CLIENT_MYSQL: a client without it has MariaDB's own flags
	clientFoundRows       = 1 << 1
	clientLongFlag        = 1 << 2
	clientConnectWithDB   = 1 << 3
	clientODBC            = 1 << 6
	clientLocalFiles      = 1 << 7
	clientIgnoreSpace     = 1 << 8
	clientProtocol41      = 1 << 9
	clientInteractive     = 1 << 10
	clientSSL             = 1 << 11
	clientIgnoreSIGPIPE   = 1 << 12
	clientTransactions    = 1 << 13
	clientReserved        = 1 << 14
	clientSecure          = 1 << 15
	clientMultiStatements = 1 << 16
	clientMultiResults    = 1 << 17
	clientPSMultiResults  = 1 << 18
	clientPluginAuth      = 1 << 19
	clientConnectAttrs    = 1 << 20
	clientLenencAuth      = 1 << 21
	clientExpiredPassword = 1 << 22
	clientSessionTrack    = 1 << 23
	clientDeprecateEOF    = 1 << 24
	clientQueryAttributes = 1 << 27
	clientMultiFactor     = 1 << 28

	// Without these the packet has other fields, or the connection another schema.
	requiredCapabilities = clientConnectWithDB | clientProtocol41 | clientSecure | clientPluginAuth

	// What common clients announce without being asked and what would change how the server reads commands. The flags are
	// cleared on their way: the server then reads what was judged, whatever the client hoped for, and a client that uses
	// what it announced is refused by its command. LOCAL_FILES lets the server ask for files; MULTI_STATEMENTS puts two
	// messages into one packet; IGNORE_SPACE changes the lexer; QUERY_ATTRIBUTES puts fields before a statement; MULTI_FACTOR_AUTHENTICATION prolongs the connection phase.
	clearedCapabilities = clientLocalFiles | clientMultiStatements | clientIgnoreSpace | clientQueryAttributes | clientMultiFactor

	// A closed list. Left out is what changes the stream and cannot be taken back (COMPRESS, ZSTD), and
	// OPTIONAL_RESULTSET_METADATA, which changes the answers that Server follows.
	allowedCapabilities = requiredCapabilities | clearedCapabilities | clientLongPassword | clientFoundRows | clientLongFlag | clientODBC |
		clientInteractive | clientIgnoreSIGPIPE | clientTransactions | clientReserved | clientMultiResults |
		clientPSMultiResults | clientConnectAttrs | clientLenencAuth | clientExpiredPassword | clientSessionTrack |
		clientDeprecateEOF
)

// MariaDB's own capability flags ("Connecting" in its protocol documentation). They stand in the last four bytes of
// the filler; a server of MySQL does not look there.
const (
	mariadbProgress         = 1 << 0 // reports of progress among the answers
	mariadbBulkOperations   = 1 << 2 // announces COM_STMT_BULK_EXECUTE, which is refused
	mariadbExtendedMetadata = 1 << 3 // more fields in the definition of a column
	mariadbCacheMetadata    = 1 << 4 // definitions of columns may be left out of an answer
	mariadbBulkUnitResults  = 1 << 5 // answers of COM_STMT_BULK_EXECUTE

	// Left out: COM_MULTI, several commands in one packet.
	allowedMariaDB = mariadbProgress | mariadbBulkOperations | mariadbExtendedMetadata | mariadbCacheMetadata | mariadbBulkUnitResults
)
