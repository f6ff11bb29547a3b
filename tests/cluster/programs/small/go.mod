module kalium.test/small

go 1.24
