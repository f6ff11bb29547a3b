package mediation

// What shows that a line holds, file::name from the root of the repository.
const (
	surveyTest  = "runtime/internal/mediation/survey/survey_test.go::TestEverythingIsClassified"
	tableTest   = "runtime/internal/sentry/table_test.go::TestTheTableHoldsInside"
	callsTest   = "runtime/internal/sentry/sandbox_test.go::TestSystemCallsThatLeadAroundTheGuardFailInside"
	waysTest    = "runtime/internal/sentry/sandbox_test.go::TestNoWayOfSendingLeavesAMessageUnjudged"
	methodsTest = "runtime/internal/endpoint/stream_test.go::TestADeniedMessageIsEPERMAndAResetAndNoneOfItArrives"
	commandTest = "runtime/internal/sentry/start_test.go::TestCommandsThatLeadAroundTheGuardAreRefused"
	flagTest    = "runtime/internal/sentry/start_test.go::TestFlagsThatLeadAroundTheGuardAreRefused"
	marksTest   = "runtime/internal/sentry/start_test.go::TestAnnotationsThatChangeGVisorAreRefused"
	podTest     = "runtime/internal/sentry/pod_test.go::TestSharedMemoryOfAPodIsLetPass"
	deviceTest  = "runtime/internal/sentry/start_test.go::TestDevicesOfTheHostAreRefused"
)

// usualTests are those of lines that name none. A harmless line is held by the survey: it has been looked at, and a later
// gVisor that adds to it is noticed.
var usualTests = map[Kind]map[Class]string{
	Calls:        {Refused: tableTest, Replaced: callsTest, EndsAtEndpoint: waysTest},
	Sockets:      {Refused: tableTest, EndsAtEndpoint: waysTest, Inside: tableTest},
	Transports:   {Refused: tableTest, EndsAtEndpoint: waysTest},
	Providers:    {Refused: tableTest, EndsAtEndpoint: waysTest},
	Factories:    {Refused: tableTest, EndsAtEndpoint: waysTest},
	Makers:       {Refused: tableTest, EndsAtEndpoint: waysTest},
	Methods:      {EndsAtEndpoint: methodsTest},
	Options:      {Refused: tableTest},
	MessageFlags: {Refused: tableTest, EndsAtEndpoint: waysTest},
	Ioctls:       {Refused: tableTest},
	Commands:     {Refused: commandTest},
	Flags:        {Refused: flagTest, Replaced: flagTest},
	Annotations:  {Refused: marksTest, Inside: marksTest},
	Devices:      {Refused: deviceTest},
}

// TestOf returns what shows that a line of a kind holds.
func TestOf(kind Kind, line Line) string {
	if line.Test != "" {
		return line.Test
	}
	if test := usualTests[kind][line.Class]; test != "" {
		return test
	}
	return surveyTest
}
